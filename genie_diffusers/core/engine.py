"""The one place that knows what a row means: tables made ready to run, one step of them, and whole runs.

Everything here is pure: a step is handed what earlier steps have seen and returns it with its own. So a run can be
started anywhere, differentiated, and shared between threads.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .parametrisation import Parametrisation
from .table import Row, Table, product

#: what a step leaves for later ones, by term
Sight = Mapping[str, torch.Tensor]
#: that of earlier steps, the latest first
Seen = tuple[Sight, ...]
#: what only a source outside the engine knows
SOURCED = ("slope", "residual")
#: ε as the model predicted it, where clipping leaves another `"prediction"`
UNCLIPPED = "unclipped"


class Plan:
    """
    A table made ready to run with a model: corrections and conversions of the model's output folded into its rows.

    Near pure noise ε and its weight are so large that the conversion of the output and the update nearly cancel.
    Adding their weights in float64 leaves nothing to cancel in the precision of the sample.

    Args:
        table ([`Table`]): The sampler.
        parametrisation ([`Parametrisation`] or anything with its `to_noise` and `to_data`):
            What the model predicts. One with a method `conversions(table)` states the rows themselves.
        clips (`bool`, defaults to `False`): Whether x_0 is clipped, so that nothing linear can be folded.
        fold (`bool`, defaults to `True`):
            Whether conversions of the model's output are folded into the rows. Where weights are learned, their
            gradients need what they weigh to be at hand, and nothing else.
        combine (`Callable`, *optional*):
            `combine(weights, states)` for weights that are no numbers, [`LinearDiffusion.combine`].

    Raises:
        ValueError: If weights are matrices, and there is no `combine`.
    """

    def __init__(
        self,
        table: Table,
        parametrisation: Any,
        clips: bool = False,
        combine: Callable | None = None,
        fold: bool = True,
    ):
        self.table, self.clips, self._combine, self._folds = table, clips, combine, fold
        table = table.fold()
        steps = range(len(table))
        rows = table.rows
        if combine is None and any(np.size(w) > 1 for row in rows for w in row.values() if isinstance(w, np.ndarray)):
            raise ValueError("`combine` must be that of the path, `process.combine`, for weights that are matrices.")
        to_noise, to_data = conversions(table, parametrisation)
        #: the terms of each step that some row weighs, in it or later, and those that are weighed later
        self.needed: list[set[str]] = [set() for _ in steps]
        self.kept: list[set[str]] = [set() for _ in steps]
        for index, row in enumerate(rows):
            for what, lag in row:
                self.needed[index - lag].add(what)
                if lag > 0:
                    self.kept[index - lag].add(what)
        #: the steps in which a source is asked
        self.sourced = {what: {i for i in steps if what in self.needed[i]} for what in SOURCED}
        asked = self.sourced["slope"] | self.sourced["residual"]
        # A source is told the slope of the history, which is a difference of the last two predictions.
        self._histories = {i - 1 for i in asked}
        self.noisy = {i for i in steps if _counts(rows[i].get(("noise", 0), 0.0))}
        self.depth = max((lag for row in rows for _, lag in row), default=0) + 1
        self.depth = max(self.depth, 2) if asked else self.depth
        back: Sequence[Row] = ()
        if clips:
            levels = [table.model_level(index) for index in steps]
            back = [{("sample", 0): 1 / sigma, ("data", 0): -alpha / sigma} for alpha, sigma in levels]
        elif fold:
            rows = [_folded(row, to_noise[i], to_data[i]) for i, row in enumerate(rows)]
        self._rows: dict[str, Sequence[Row]] = {"step": rows, "prediction": to_noise, "data": to_data, "back": back}
        self._tensors: dict = {}

    def __len__(self) -> int:
        return len(self.table)

    def visit(
        self,
        index: int,
        seen: Seen,
        sample: torch.Tensor,
        output: torch.Tensor,
        noise: torch.Tensor | None = None,
        source: Callable | None = None,
        clip: Callable | None = None,
        dense: bool = False,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], Seen]:
        """
        All of a step but its sum: the weights and the tensors to add up, and what has been seen now.

        Args:
            dense (`bool`, defaults to `False`):
                Every column of the table, weights of zero included, so that all steps are one and the same sum.
            others: As in [`step`].
        """
        dtype = torch.promote_types(sample.dtype, torch.float32)
        now: dict[str, Any] = {"sample": sample, "output": output}
        needs, own_data = self.needed[index], None
        asked = [what for what in SOURCED if what in needs]
        if self.clips:
            own_data = self._apply("data", index, now, dtype)
            now["data"] = own_data if clip is None else clip(own_data)
            if "prediction" in needs:
                now["prediction"] = self._apply("back", index, now, dtype)
        else:
            # what no later step weighs is folded into the row of this one
            made = self.kept[index] if self._folds else needs
            for what in ("prediction", "data"):
                if what in made:
                    now[what] = self._apply(what, index, now, dtype)
        if asked or index in self._histories:
            # A source knows the prediction of its model, not the clipped one.
            known = not self.clips and "prediction" in now
            now[UNCLIPPED] = now["prediction"] if known else self._apply("prediction", index, now, dtype)
        for what in asked:
            if source is None:
                raise ValueError(f"Step {index} of this table weighs a {what}, and there is no source of it.")
            now[what] = source(what, index, sample, output, now[UNCLIPPED], self._history_slope(index, seen, now))
            # Where x_0 is held at a limit, dx_0/dλ = 0, and with it dε/dλ = −(α/σ) dx_0/dλ. Where thresholding
            # rescales a whole sample the slope is left out too.
            if self.clips:
                now[what] = torch.where(now["data"] == own_data, now[what], torch.zeros_like(now[what]))
        now["noise"] = noise
        weights, tensors = [], []
        for (what, lag), weight in self._on("dense" if dense else "step", sample.device, dtype)[index]:
            sight = now if lag == 0 else seen[lag - 1] if lag <= len(seen) else {}
            tensor = sight.get(what)
            weights.append(weight)
            # Absent where its weight is zero. A tensor of its own each time: compiled code looks for aliases.
            tensors.append(torch.zeros_like(sample, dtype=dtype) if tensor is None else tensor)
        kept = self.kept[index] | ({UNCLIPPED} if index in self._histories else set())
        sight = {what: now[what] for what in kept if what != "noise"}
        return weights, tensors, (sight, *seen)[: self.depth - 1]

    def sum(
        self, weights: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], dtype: torch.dtype
    ) -> torch.Tensor:
        """Σ weight · tensor, in at least float32, then in `dtype`."""
        compute = weights[0].dtype
        if weights[0].ndim > 0 and self._combine is not None:
            return self._combine(weights, [tensor.to(compute) for tensor in tensors]).to(dtype)
        total = tensors[0].to(compute) * weights[0]
        for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
            total.addcmul_(tensor if tensor.dtype is compute else tensor.to(compute), weight)
        return total if dtype is compute else total.to(dtype)

    def apply(self, rows: str, index: int, **tensors: torch.Tensor) -> torch.Tensor:
        """Row `index` of `"data"` or `"prediction"` on `sample` and `output`, or of rows that were added."""
        dtype = torch.promote_types(tensors["sample"].dtype, torch.float32)
        return self._apply(rows, index, tensors, dtype)

    def add_rows(self, name: str, rows: Sequence[Row]):
        """Further rows for `apply`."""
        self._rows[name] = rows

    def _apply(self, name: str, index: int, now: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        row = self._on(name, now["sample"].device, dtype)[index]
        return self.sum([weight for _, weight in row], [now[what] for (what, _), _ in row], dtype)

    def _history_slope(self, index: int, seen: Seen, now: Sight) -> torch.Tensor | None:
        if not seen or UNCLIPPED not in seen[0]:
            return None
        before, here = (np.log(float(alpha)) - _log(sigma) for alpha, sigma in self._point_levels(index))
        step = here - before
        # neither from clean data nor at a point that is visited twice
        if step == 0 or not np.isfinite(step):
            return None
        return (now[UNCLIPPED] - seen[0][UNCLIPPED]) / step

    def _point_levels(self, index: int):
        table = self.table
        return [(table.alphas[i], table.sigmas[i]) for i in (index - 1, index)]

    def _on(self, name: str, device: torch.device, dtype: torch.dtype) -> list:
        """Rows as tensors where the sample is, numbers as zero-dimensional ones: one transfer a run."""
        key = (name, device, dtype)
        if key not in self._tensors:
            # kept beyond an inference mode that the first step may be in
            with torch.inference_mode(False):
                self._tensors[key] = (
                    self._dense(device, dtype) if name == "dense" else self._sparse(name, device, dtype)
                )
        return self._tensors[key]

    def _sparse(self, name: str, device, dtype) -> list:
        # A sum of nothing is nothing.
        rows = [
            [(term, weight) for term, weight in row.items() if _counts(weight)] or [(("sample", 0), 0.0)]
            for row in self._rows[name]
        ]
        weights = [weight for row in rows for _, weight in row]
        if not any(torch.is_tensor(weight) or np.ndim(weight) for weight in weights):
            moved = iter(
                torch.tensor(weights, dtype=torch.float64, device="cpu")
                .to(device=device, dtype=dtype, non_blocking=True)  # a blocking copy waits for the device
                .unbind()
            )
        else:  # learned ones keep their graph
            moved = (
                torch.as_tensor(weight, device=getattr(weight, "device", "cpu")).to(device=device, dtype=dtype)
                for weight in weights
            )
        return [[(term, next(moved)) for term, _ in row] for row in rows]

    def _dense(self, device, dtype) -> list:
        """All rows over the same columns, as views of one (steps × columns) tensor."""
        rows = self._rows["step"]
        terms = sorted({term for row in rows for term in row} | {("sample", 0), ("output", 0)})
        matrices = [np.shape(weight) for row in rows for weight in row.values() if np.ndim(weight)]
        shape = np.broadcast_shapes(*matrices) if matrices else ()
        values = np.zeros((len(rows), len(terms), *shape))
        for index, row in enumerate(rows):
            for term, weight in row.items():
                values[index, terms.index(term)] = weight
        tensor = torch.from_numpy(values).to(device=device, dtype=dtype)
        return [list(zip(terms, row.unbind(), strict=True)) for row in tensor]


def step(
    plan: Plan,
    index: int,
    seen: Seen,
    sample: torch.Tensor,
    output: torch.Tensor,
    noise: torch.Tensor | None = None,
    source: Callable | None = None,
    clip: Callable | None = None,
) -> tuple[torch.Tensor, Seen]:
    """
    One step of a table.

    Args:
        plan ([`Plan`]): The table, made ready.
        index (`int`): The step.
        seen (`tuple`): What the earlier steps have returned, empty in the first one.
        sample (`torch.Tensor` of shape `(batch, ...)`): x_t.
        output (`torch.Tensor` of the same shape): What the model returned for it.
        noise (`torch.Tensor` of the same shape, *optional*): Standard normal noise, for steps that add some.
        source (`Callable`, *optional*):
            `source(term, index, sample, output, noise_prediction, history_slope)` → the `"slope"` or the
            `"residual"` at this step, for tables that weigh one.
        clip (`Callable`, *optional*): x_0 → x_0 clipped, for a plan that clips.

    Returns:
        `tuple`: The next sample, in the dtype of `sample`, and what has been seen.
    """
    weights, tensors, seen = plan.visit(index, seen, sample, output, noise, source, clip)
    return plan.sum(weights, tensors, sample.dtype), seen


def run(
    table: Table,
    model: Callable,
    sample: torch.Tensor,
    parametrisation: Any = None,
    noise: Callable | None = None,
    source: Callable | None = None,
    clip: Callable | None = None,
    begin: int = 0,
    visit: Callable | None = None,
    fold: bool = True,
    combine: Callable | None = None,
) -> torch.Tensor:
    """
    Sample with a table.

    Args:
        table ([`Table`]): The sampler; where its weights are tensors, the result is differentiable in them.
        model (`Callable`): `model(sample, timestep)` → the prediction, with `timestep` as in `table.timesteps`.
        sample (`torch.Tensor` of shape `(batch, ...)`): Where the run starts, x_T for a whole one.
        parametrisation ([`Parametrisation`], *optional*): What the model predicts. Default: ε.
        noise (`Callable`, *optional*):
            `noise(index, sample)` → standard normal noise, for tables that add some. Default: from PyTorch's global
            generator.
        source, clip (`Callable`, *optional*): As in [`step`].
        begin (`int`, defaults to 0): The step to start with.
        visit (`Callable`, *optional*): Called in each step as `visit(index, tensors)`, with the tensors it adds up.
        fold (`bool`, defaults to `True`), combine (`Callable`, *optional*): As in [`Plan`].

    Returns:
        `torch.Tensor`: Where the run ends, clean data for most tables.
    """
    parametrisation = Parametrisation() if parametrisation is None else parametrisation
    plan = Plan(table, parametrisation, clips=clip is not None, combine=combine, fold=fold)
    seen: Seen = ()
    for index in range(begin, len(plan)):
        output, fresh = model(sample, table.timesteps[index]), None
        if index in plan.noisy:
            fresh = torch.randn_like(sample) if noise is None else noise(index, sample)
        weights, tensors, seen = plan.visit(index, seen, sample, output, fresh, source, clip)
        if visit is not None:
            visit(index, tensors)
        sample = plan.sum(weights, tensors, sample.dtype)
    return sample


def conversions(table: Table, parametrisation: Any) -> tuple[list[Row], list[Row]]:
    """For each step the row that makes ε of the sample and the model's output, and the row that makes x_0."""
    if hasattr(parametrisation, "conversions"):
        return parametrisation.conversions(table)
    pairs = [(("sample", 0), ("output", 0)), (("sample", 0), ("output", 0))]
    levels = [table.model_level(index) for index in range(len(table))]
    functions = parametrisation.to_noise, parametrisation.to_data
    to_noise, to_data = (
        [dict(zip(terms, function(*level), strict=True)) for level in levels]
        for terms, function in zip(pairs, functions, strict=True)
    )
    return to_noise, to_data


def _counts(weight: Any) -> bool:
    return torch.is_tensor(weight) or bool(np.any(weight) if np.ndim(weight) else weight)


def _folded(row: Row, to_noise: Row, to_data: Row) -> Row:
    row = dict(row)
    for what, conversion in (("prediction", to_noise), ("data", to_data)):
        if (what, 0) in row:
            of_prediction = row.pop((what, 0))
            for term, weight in conversion.items():
                row[term] = row.get(term, 0.0) + product(of_prediction, weight)
    return row


def _log(value) -> float:
    return float(np.log(float(value))) if float(value) > 0 else -np.inf
