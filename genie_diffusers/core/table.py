"""A sampler as a value: the noise levels that a run visits, and for each step the weights of what it adds up."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

#: (what, how many steps ago): ("sample", 0), ("data", 1), ("noise", 0), …
Term = tuple[str, int]
#: a number, a tensor that is learned, or an array of a path's `weight_shape`, whose last two axes are a matrix
Weight = Any
#: the weights of one step; what is not named has weight zero
Row = dict[Term, Weight]

#: in log(α/σ), by which the levels of a table may differ from those of the path that it is read for
LEVEL_TOLERANCE = 1e-2

#: what a row may weigh: states x; predictions ε and x_0; dε/dλ and what a network adds, both of a source; fresh noise
TERMS = ("sample", "prediction", "data", "slope", "residual", "noise")

#: what an entry of `tables` consists of
ENTRY_KEYS = {"timesteps", "alphas", "sigmas", "rows", "corrections", "model_levels", "learned_for"}


@dataclasses.dataclass(frozen=True, eq=False)
class Levels:
    """
    The points of a run: N model calls, and its end.

    Args:
        timesteps (`np.ndarray` of shape `(N,)`): What the model is called with.
        alphas, sigmas (`np.ndarray` of shape `(N + 1,)`): α and σ of x = α x_0 + σ z at the calls and at the end.
        path ([`LinearDiffusion`], *optional*): What is diffused, for solvers that need more than its noise levels.
    """

    timesteps: np.ndarray
    alphas: np.ndarray
    sigmas: np.ndarray
    path: Any = None

    def __len__(self) -> int:
        return len(self.timesteps)

    @cached_property
    def gammas(self) -> np.ndarray:
        """γ = σ/α, what diffusers' Karras-type schedulers call sigma."""
        return self.sigmas / self.alphas

    @cached_property
    def lambdas(self) -> np.ndarray:
        """λ = log(α/σ), infinite at clean data."""
        with np.errstate(divide="ignore"):
            return np.log(self.alphas) - np.log(self.sigmas)


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """
    A sampler: where it calls the model, and in each step the weights of the tensors whose sum is the next sample.

    It is all that [`~core.engine.run`] needs beside the model, and `combine` of its path where weights are matrices.
    Rows may hold tensors, which are then what is learned.

    Args:
        timesteps (sequence of `float`, length N): What the model is called with.
        alphas, sigmas (sequences of `float`, length N + 1):
            α and σ of x = α x_0 + σ z at the calls and at the end.
        rows (sequence of `dict`, length N): Row i holds the weights of step i, keyed by (term, how many steps ago).
        corrections (sequence of `dict`, length N or 0):
            Row i holds the weights of what is added to the sample of step i before it, once the model was called.
        model_levels (pair of sequences of `float`, *optional*):
            α and σ that the model is told in its calls, where they are not those of the point: at clean data.
        learned_for (`dict`, *optional*):
            What it was learned for, as configuration keys, where its levels do not say it: the options of the decoder
            that an encoder was learned with, which [`GenieInverseScheduler`] compares with its own.
    """

    timesteps: Any
    alphas: Any
    sigmas: Any
    rows: Sequence[Row]
    corrections: Sequence[Row] = ()
    model_levels: tuple[Any, Any] | None = None
    learned_for: Mapping[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def __iter__(self):
        return iter(self.rows)

    def __eq__(self, other) -> bool:
        return isinstance(other, Table) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def fold(self) -> "Table":
        """The same sampler without corrections: each is added to the row that follows from the corrected sample."""
        if not any(self.corrections):
            return dataclasses.replace(self, corrections=())
        rows = []
        for row, correction in zip(self.rows, self.corrections, strict=True):
            folded, of_sample = dict(row), row.get(("sample", 0), 0.0)
            for term, weight in correction.items():
                folded[term] = folded.get(term, 0.0) + product(of_sample, weight)
            rows.append(folded)
        return dataclasses.replace(self, rows=tuple(rows), corrections=())

    def model_level(self, index: int) -> tuple[Any, Any]:
        """α and σ that the model is told in step `index`."""
        alphas, sigmas = (self.alphas, self.sigmas) if self.model_levels is None else self.model_levels
        return alphas[index], sigmas[index]

    def needs(self) -> set[str]:
        """The terms that its rows weigh."""
        return {what for row in (*self.rows, *self.corrections) for what, _ in row}

    def reaches_before(self, begin: int) -> tuple[int, int] | None:
        """The first step of a run from `begin` on that weighs what was seen earlier, and when; `None` if none does."""
        for index, row in enumerate(self.fold().rows[begin:], start=begin):
            furthest = max((lag for _, lag in row), default=0)
            if furthest > index - begin:
                return index, index - furthest
        return None

    def marginals(self) -> tuple[np.ndarray, np.ndarray]:
        """
        α_k and σ_k of x_k = α_k x_0 + σ_k z that the sampler has when every prediction is x_0.

        A model meets at x_k what it was trained on where they are `alphas` and `sigmas`. DDPM and DDIM have that
        property; a learned sampler need not. What a source adds counts as zero.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: Two arrays of shape `(N + 1,)`.

        Raises:
            ValueError: If weights are matrices, or the run starts at clean data, where ε is nothing of x.
        """
        if any(np.ndim(weight) for row in self.rows for weight in row.values()) or not self.sigmas[0] > 0:
            raise ValueError("`marginals` are those of tables whose weights are numbers and that start with noise.")
        steps = len(self)
        alphas, covariance = np.zeros(steps + 1), np.zeros((steps + 1, steps + 1))
        alphas[0], covariance[0, 0] = self.alphas[0], self.sigmas[0] ** 2
        for index, row in enumerate(self.fold().rows):
            weights, of_data = np.zeros(steps + 1), 0.0
            for (what, lag), weight in row.items():
                point = index - lag
                if what == "sample":
                    weights[point] += weight
                elif what == "data":
                    of_data += weight
                elif what == "prediction":  # ε = (x − α x_0)/σ; the slope of a single data point is zero
                    weights[point] += weight / self.sigmas[point]
                    of_data -= weight * self.alphas[point] / self.sigmas[point]
            alphas[index + 1] = weights @ alphas + of_data
            covariance[index + 1] = covariance[:, index + 1] = covariance @ weights
            covariance[index + 1, index + 1] = weights @ covariance @ weights + row.get(("noise", 0), 0.0) ** 2
        return alphas, np.sqrt(np.maximum(covariance.diagonal(), 0.0))  # zero is so to rounding

    # --- as JSON ---------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """
        Plain numbers and lists, the entry of the configuration key `tables`.

        `"rows"` holds for each step, by term, the weights of that tensor in this step, one step ago, and so on.
        """
        result: dict[str, Any] = {
            "timesteps": [int(t) if t == int(t) else float(t) for t in map(float, self.timesteps)],
            "alphas": [float(alpha) for alpha in self.alphas],
            "sigmas": [float(sigma) for sigma in self.sigmas],
            "rows": [_by_term(row) for row in self.rows],
        }
        if any(self.corrections):
            result["corrections"] = [_by_term(row) for row in self.corrections]
        if self.model_levels is not None:
            result["model_levels"] = [[float(value) for value in values] for values in self.model_levels]
        if self.learned_for is not None:
            result["learned_for"] = dict(self.learned_for)
        return result

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any], path: Any = None, steps: int | None = None) -> "Table":
        """
        The inverse of [`~Table.to_dict`]; what earlier versions wrote is read too.

        Args:
            entry (mapping): Of the configuration key `tables`.
            path ([`LinearDiffusion`], *optional*):
                The model's path. Timesteps must lie on it, and noise levels agree with it; where `entry` states none,
                they are those of the path, and the run ends at clean data.
            steps (`int`, *optional*): The number of model calls that it must have.

        Raises:
            ValueError: If it is malformed, of another path, or of another number of model calls.
        """
        return read_table(entry, path, steps)

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> "Table":
        return cls.from_dict(json.loads(text))


def build(levels: Levels, row, correction=None, begin: int = 0, model_levels=None) -> Table:
    """
    The table of a solver for a run that starts at step `begin`.

    Args:
        levels ([`Levels`]): The points of the run.
        row (`Callable`):
            `row(levels, index, known)` → the weights of step `index`, with the predictions of `known` steps at hand,
            the current one included.
        correction (`Callable`, *optional*):
            `correction(levels, index, known, predictor)` → the weights of what is added to the sample of step `index`
            before that; `predictor` is the row of the step that led there, empty where the run starts.
        begin (`int`, defaults to 0): The first step; those before it are as for a run that starts there.
        model_levels (*optional*): As in [`Table`].

    Raises:
        ValueError: If a row weighs what there is not, or by what is no finite number.
    """
    rows, corrections = [], []
    for index in range(len(levels)):
        known = max(index - begin, 0) + 1
        rows.append(_checked(row(levels, index, known), index, known))
        if correction is not None:
            predictor = rows[index - 1] if known > 1 else {}
            corrections.append(_checked(correction(levels, index, known, predictor), index, known))
    return Table(
        timesteps=levels.timesteps,
        alphas=levels.alphas,
        sigmas=levels.sigmas,
        rows=tuple(rows),
        corrections=tuple(corrections),
        model_levels=model_levels,
    )


def _checked(row: Row, index: int, known: int) -> Row:
    if not isinstance(row, Mapping):
        raise ValueError(f"Step {index} must have a dictionary of weights by (term, how many steps ago), got {row!r}.")
    for term, weight in row.items():
        what, lag = term if isinstance(term, tuple) and len(term) == 2 else (term, None)
        if what not in TERMS or lag not in range(1 if what == "noise" else known):
            raise ValueError(
                f"Step {index} must weigh (term, how many steps ago) with a term of {', '.join(TERMS)} and at most "
                f"{known - 1} steps ago, noise of now alone, got {term!r}."
            )
        if not torch.is_tensor(weight) and not np.all(np.isfinite(weight)):
            raise ValueError(f"Step {index} must weigh {term!r} by a finite number, got {weight}.")
    return row


def product(first: Weight, second: Weight) -> Weight:
    """The weight that acts like `second`, then `first`."""
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return first @ second
    return first * second


def _by_term(row: Row) -> dict[str, list]:
    depths: dict[str, int] = {}
    for what, lag in row:
        depths[what] = max(depths.get(what, 0), lag + 1)
    return {what: [_plain(row.get((what, lag), 0.0)) for lag in range(depth)] for what, depth in depths.items()}


def _plain(weight: Weight):
    weight = weight.detach().cpu() if torch.is_tensor(weight) else weight
    return np.asarray(weight, dtype=np.float64).tolist()


# --- reading ---------------------------------------------------------------------------------------------------------


def encodes(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of `tables` goes from data to noise."""
    if not isinstance(entry, Mapping) or "sigmas" not in entry:
        return False
    try:
        ends = [(entry["sigmas"][end], entry["alphas"][end] if "alphas" in entry else 1.0) for end in (0, -1)]
        (sigma_0, alpha_0), (sigma_1, alpha_1) = ends
        return float(sigma_0) * float(alpha_1) < float(sigma_1) * float(alpha_0)
    except (TypeError, ValueError, IndexError, KeyError):
        return False  # malformed, as is said where it is read


def entries(tables: Any) -> dict[str, Any]:
    """
    The configuration key `tables` by number of model calls, as strings: as JSON has them.

    Raises:
        ValueError: If it is no dictionary from numbers of model calls.
    """
    if tables is None:
        return {}
    if not isinstance(tables, Mapping) or not all(str(steps).isdigit() for steps in tables):
        given = list(tables) if isinstance(tables, Mapping) else type(tables).__name__
        raise ValueError(f"`tables` must be a dictionary from numbers of model calls to tables, got {given}.")
    return {str(steps): entry for steps, entry in tables.items()}


def read_table(entry: Mapping[str, Any], path: Any, steps: int | None, name: str = "tables") -> Table:
    """[`Table.from_dict`]."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"`{name}` must be a dictionary, got {type(entry).__name__}.")
    if steps is not None and path is not None and "timesteps" in entry:
        _check_timesteps(_numbers(entry["timesteps"], "timesteps", name), path, name, steps)
    entry = _translated(entry, path)
    if "rows" not in entry or "timesteps" not in entry:
        raise ValueError(f"`{name}` must have the keys 'timesteps' and 'rows', got {', '.join(map(repr, entry))}.")
    unknown = set(entry) - ENTRY_KEYS
    if unknown:
        raise ValueError(f"`{name}` must have keys of {', '.join(sorted(ENTRY_KEYS))}, got {sorted(unknown)}.")
    timesteps = _numbers(entry["timesteps"], "timesteps", name)
    steps = len(timesteps)
    rows = tuple(_row(row, name) for row in entry["rows"])
    corrections = tuple(_row(row, name) for row in entry.get("corrections", ()))
    if len(rows) != steps or len(corrections) not in (0, steps):
        raise ValueError(
            f"`{name}` must have a row for each of its {steps} timesteps, and as many corrections or none, got "
            f"{len(rows)} and {len(corrections)}."
        )
    _check_rows(rows, name)
    _check_rows(corrections, name)
    if path is not None:
        _check_timesteps(timesteps, path, name, steps)
    alphas, sigmas = (_numbers(entry[key], key, name) if key in entry else None for key in ("alphas", "sigmas"))
    if alphas is None or sigmas is None:
        if path is None:
            raise ValueError(f"`{name}` must state 'alphas' and 'sigmas'.")
        alphas, sigmas = np.append(path.alpha(timesteps), 1.0), np.append(path.sigma(timesteps), 0.0)
    for key, values in (("alphas", alphas), ("sigmas", sigmas)):
        if len(values) != steps + 1 or values.min() < 0:
            raise ValueError(
                f"`{name}` must have {steps + 1} values of {key!r}, none negative, for {steps} model calls, got "
                f"{values.tolist()}."
            )
    model_levels = entry.get("model_levels")
    if model_levels is not None:
        if not isinstance(model_levels, Sequence) or len(model_levels) != 2:
            raise ValueError(f"`{name}` must have two lists in 'model_levels', α and σ, got {model_levels}.")
        model_levels = tuple(_numbers(values, "model_levels", name) for values in model_levels)
        if any(len(values) != steps for values in model_levels):
            raise ValueError(f"`{name}` must have {steps} values of α and of σ in 'model_levels', got {model_levels}.")
    table = Table(timesteps, alphas, sigmas, rows, corrections, model_levels, entry.get("learned_for"))
    if path is not None:
        _check_levels(table, path, name)
    return table


def _translated(entry: Mapping[str, Any], path: Any) -> Mapping[str, Any]:
    """What earlier versions wrote: rows of heads and of encoders (by noise levels), columns of `GGDMScheduler`."""
    if "rows" not in entry and "timesteps" not in entry and path is not None and {"sigmas", "weights"} <= set(entry):
        return _encoder(entry, path)
    if "rows" in entry or "timesteps" not in entry:
        return entry
    steps = len(entry["timesteps"])
    if "weights" in entry:
        of_residual = entry.get("residuals", [0.0] * steps)
        if not len(entry["weights"]) == len(of_residual) == steps:
            raise ValueError(
                f"`tables` must have 'weights' and 'residuals' of each of {steps} steps, got {len(entry['weights'])} "
                f"and {len(of_residual)}."
            )
        rows = [
            {"sample": [of_sample], "prediction": of_predictions} | ({"residual": [residual]} if residual else {})
            for (of_sample, *of_predictions), residual in zip(entry["weights"], of_residual, strict=True)
        ]
        return {"timesteps": entry["timesteps"], "rows": rows}
    names = {"sample": "sample", "prediction": "data" if entry.get("data_form") else "prediction", "slope": "slope"}
    columns = {new: entry[old] for old, new in names.items() if old in entry}
    if "noise" in entry:
        columns["noise"] = [[sigma] for sigma in entry["noise"]]
    for what, column in columns.items():
        if len(column) != steps:
            lengths = [len(row) for row in column]
            raise ValueError(f"`tables` must weigh {what!r} in each of {steps} steps, got rows of {lengths} weights.")
    rows = [{what: column[index] for what, column in columns.items()} for index in range(steps)]
    return {"timesteps": entry["timesteps"], "rows": rows}


def _encoder(entry: Mapping[str, Any], path: Any) -> Mapping[str, Any]:
    gammas = _numbers(entry["sigmas"], "sigmas", "tables")
    start = path.timestep_min
    timesteps = np.append(start, path.timestep(-np.log(gammas[1:-1])))
    if path.is_discrete:
        timesteps = np.round(timesteps)
    alphas = path.alpha_at(gammas)
    sigmas = gammas * alphas
    model_alphas, model_sigmas = alphas[:-1].copy(), sigmas[:-1].copy()
    model_alphas[0], model_sigmas[0] = path.alpha(start), path.sigma(start)
    return {
        "timesteps": timesteps,
        "alphas": alphas,
        "sigmas": sigmas,
        "rows": [{"sample": row[:1], "prediction": row[1:]} for row in entry["weights"]],
        "model_levels": [model_alphas, model_sigmas],
        "learned_for": entry.get("options"),
    }


def _numbers(values: Any, what: str, name: str) -> np.ndarray:
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        numbers = np.array(np.nan)
    if numbers.ndim != 1 or len(numbers) == 0 or not np.all(np.isfinite(numbers)):
        raise ValueError(f"`{name}` must have finite numbers for {what!r}, at least one, got {values}.")
    return numbers


def _row(row: Any, name: str) -> Row:
    if not isinstance(row, Mapping) or not set(row) <= set(TERMS):
        raise ValueError(f"A row of `{name}` must weigh nothing but {', '.join(TERMS)}, got {row}.")
    weights: Row = {}
    for what, by_lag in sorted(row.items(), key=lambda item: TERMS.index(item[0])):  # sums round in one order
        if not isinstance(by_lag, Sequence) or isinstance(by_lag, str):
            raise ValueError(f"A row of `{name}` must have a list of weights for {what!r}, got {by_lag!r}.")
        for lag, given in enumerate(by_lag):
            try:
                weight = np.asarray(given, dtype=np.float64)
            except (TypeError, ValueError):
                weight = np.array(np.nan)
            if not np.all(np.isfinite(weight)):
                raise ValueError(f"A row of `{name}` must weigh {what!r} by finite numbers, got {by_lag}.")
            if np.any(weight):
                weights[what, lag] = float(weight) if weight.ndim == 0 else weight
    return weights


def _check_rows(rows: Sequence[Row], name: str):
    steps = len(rows)
    for what in TERMS:
        depths = [max((lag + 1 for other, lag in row if other == what), default=0) for row in rows]
        if any(depth > index + 1 for index, depth in enumerate(depths)):
            raise ValueError(
                f"`{name}` must weigh {what!r} in each of {steps} steps, at most back to the first one, got rows of "
                f"{depths} weights."
            )
    noise = [row.get(("noise", 0), 0.0) for row in rows]
    # a square root of a covariance may have negative entries
    negative = any(np.ndim(sigma) == 0 and sigma < 0 for sigma in noise)
    if any(lag for row in rows for what, lag in row if what == "noise") or negative:
        raise ValueError(f"`{name}` must have {steps} values of 'noise', none negative, got {noise}.")


def _check_timesteps(timesteps: np.ndarray, path: Any, name: str, steps: int):
    low, high = path.timestep_min, path.timestep_max
    lengths = np.diff(timesteps)
    # from data to noise the smallest timestep may stand for clean data, and for itself
    twice = len(timesteps) > 1 and timesteps[0] == timesteps[1] == low
    in_order = np.all(lengths < 0) or np.all(lengths[int(twice) :] > 0)
    if len(timesteps) != steps or not in_order or timesteps.max() > high or timesteps.min() < low:
        raise ValueError(
            f"`{name}` must have {steps} strictly decreasing timesteps between {high:g} and {low:g} for {steps} "
            f"model calls, got {[int(t) if t == int(t) else t for t in timesteps.tolist()]}."
        )


def _check_levels(table: Table, path: Any, name: str):
    """A table of another noise schedule would sample, wrongly."""
    alphas, sigmas = np.array([table.model_level(index) for index in range(len(table))]).T
    with np.errstate(divide="ignore"):
        missed = np.abs(np.log(alphas / sigmas) - path.log_snr(table.timesteps))
    if not np.all(missed < LEVEL_TOLERANCE):
        raise ValueError(
            f"`{name}` must be for the noise levels of this model, got noise levels of another model: at its timestep "
            f"{table.timesteps[missed.argmax()]:g} log(α/σ) differs by {missed.max():.3g}."
        )
