"""How the branches of a guided model call combine to the prediction that the scheduler is given.

A pipeline with classifier-free guidance calls the model on a batch of equal parts (unconditional, conditional,
perturbed …), or once for each of them, and hands the scheduler one combination of the outputs. A slope of the guided
prediction combines the slopes of the branches, each taken along the guided velocity, with the same weights.
"""

import torch

#: Relative residual above which a guided prediction is not a linear combination of the branches: far above the
#: rounding of half precision, far below what any nonlinear guidance does.
NONLINEAR_RESIDUAL = 0.02

#: Relative distance above which a prediction is not the output of the only branch. A pipeline hands it on as it is, or
#: rounded to the precision of its sample, which is coarser than this for bfloat16 alone.
UNGUIDED_DISTANCE = 1e-3

#: Calls of the model between two steps that are taken for branches.
MAX_CALLS = 8


def holds(condition: torch.Tensor) -> bool:
    """
    Whether `condition` is true. All that sources compare is read here, which on an accelerator waits for it.

    Tensors without values, on the meta device, are taken to agree.
    """
    return condition.is_meta or bool(condition)


def count_branches(model_input: torch.Tensor, sample: torch.Tensor, check_values: bool) -> int:
    """
    The number of parts in the batch of a model call, which must each have been called with `sample`.

    Args:
        model_input (`torch.Tensor` of shape `(branches · batch, channels or more, ...)`):
            What the model was called with; further channels (masks, low-resolution images) follow those of `sample`.
        sample (`torch.Tensor` of shape `(batch, channels, ...)`):
            What the scheduler is stepping.
        check_values (`bool`):
            Compare the values too, which on an accelerator waits for it.

    Raises:
        ValueError: If the model was called with something else.
    """
    branches, rest = divmod(model_input.shape[0], sample.shape[0])
    same_shape = model_input.shape[2:] == sample.shape[2:] and model_input.shape[1] >= sample.shape[1]
    if rest or not branches or not same_shape:
        raise ValueError(
            f"The slope source's model was last called with shape {tuple(model_input.shape)}, which is no batch of "
            f"branches of the `sample` of shape {tuple(sample.shape)} given to `step`."
        )
    if check_values:
        parts = model_input[:, : sample.shape[1]].unflatten(0, (branches, sample.shape[0]))
        if not holds((parts == sample.to(parts.dtype)).all()):
            raise ValueError(
                "The slope source's model was last called with another sample than the one given to `step`. Call the "
                "model and the scheduler in turn, and attach the source to the scheduler of the same pipeline."
            )
    return branches


@torch.no_grad()
def branch_weights(outputs: torch.Tensor, guided: torch.Tensor, check_residual: bool) -> torch.Tensor:
    """
    Weights w, per sample, with guided ≈ Σ_b w_b · outputs_b, by least squares.

    Args:
        outputs (`torch.Tensor` of shape `(branches, batch, ...)`): The outputs of the branches.
        guided (`torch.Tensor` of shape `(batch, ...)`): The combination the pipeline made of them.
        check_residual (`bool`): Check that it is one, which on an accelerator waits for it.

    Returns:
        `torch.Tensor` of shape `(branches, batch, 1, ...)`.

    Raises:
        ValueError: If the guided prediction is not a linear combination of the branches.
    """
    target = guided.flatten(1).float()
    columns = outputs.flatten(2).float().movedim(0, -1)  # (batch, elements, branches)
    # Branches differ little at high noise: solve for the first branch and the differences from it, each of length one.
    columns = torch.cat([columns[..., :1], columns[..., 1:] - columns[..., :1]], dim=-1)
    lengths = columns.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    columns = columns / lengths[:, None]
    gram = columns.mT @ columns
    # Branches may coincide: a touch of regularisation, in float64 where there is one (not on MPS). `solve_ex`, unlike
    # others, does not wait for the device.
    precision = torch.float32 if gram.device.type == "mps" else torch.float64
    regularised = gram.to(precision) + 1e-7 * torch.eye(gram.shape[-1], device=gram.device, dtype=precision)
    right_side = (columns.mT @ target[..., None]).to(precision)
    solution = torch.linalg.solve_ex(regularised, right_side).result.float()
    if check_residual:
        residual = ((target - (columns @ solution)[..., 0]).norm(dim=1) / target.norm(dim=1)).max()
        if not holds(~(residual > NONLINEAR_RESIDUAL)):
            raise ValueError(
                "The prediction given to `step` is not a linear combination of the outputs of the model's calls "
                f"(relative residual {residual:.3g}), so its slope cannot be formed. Detach the slope source "
                "(`scheduler.attach(None)`) to sample with this kind of guidance."
            )
    weights = solution[..., 0] / lengths
    weights = torch.cat([weights[:, :1] - weights[:, 1:].sum(1, keepdim=True), weights[:, 1:]], dim=1)
    return weights.T.reshape(*outputs.shape[:2], *(1,) * (outputs.ndim - 2)).to(outputs.dtype)


def check_unguided(output: torch.Tensor, guided: torch.Tensor, check_values: bool):
    """
    Check that the prediction of a pipeline is the output of the only branch there is.

    Args:
        output (`torch.Tensor`): The output of that branch.
        guided (`torch.Tensor` of the same shape): What the scheduler was given, in the terms of the model.
        check_values (`bool`): Whether to look, which on an accelerator waits for it.

    Raises:
        ValueError: If the two differ by more than rounding.
    """
    if not check_values:
        return
    coarsest = max(torch.finfo(tensor.dtype).eps for tensor in (output, guided))
    output, guided = output.flatten(1).float(), guided.flatten(1).float()
    distance = ((guided - output).norm(dim=1) / output.norm(dim=1)).max()
    if not holds(~(distance > max(UNGUIDED_DISTANCE, coarsest))):
        raise ValueError(
            "The prediction given to `step` is not the output of the model's only call since the last step (relative "
            f"difference {distance:.3g}): it was guided by something else, so its slope cannot be formed. Detach the "
            "slope source (`scheduler.attach(None)`) to sample with this kind of guidance."
        )


class RunCheck:
    """Says when to compare values: always on the CPU; once a run on an accelerator, which has to be waited for."""

    def __init__(self):
        self._is_due = True

    def begin(self):
        """A new run: its first step is checked."""
        self._is_due = True

    def __call__(self, device: torch.device) -> bool:
        is_due, self._is_due = self._is_due, False
        return is_due or device.type == "cpu"
