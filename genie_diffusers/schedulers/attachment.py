"""What a scheduler is attached to: sources of slopes and residuals, and how long it holds them."""

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin


class Attachment:
    """
    A source, for as long as some scheduler holds this: acquired when it is made, and released when it is gone.

    A copy of a scheduler shares it; a pickled one is detached, as one that was saved and loaded.
    """

    def __init__(self, source: Any):
        self.source = source
        self.takes_output = _takes(source, "model_output")
        if hasattr(source, "acquire"):
            source.acquire()
            weakref.finalize(self, source.release).atexit = False

    def __deepcopy__(self, memo) -> "Attachment":
        return self

    def __reduce__(self):
        return type(None), ()


class TakesSource:
    """The part of a scheduler that knows of sources."""

    # of the scheduler
    config: Any
    process: Any
    lambdas: Any
    num_inference_steps: Any
    _build: Callable
    _built_for: int
    _step_index: int | None

    _attachment: Any = None

    def attach(self, source: Callable | None):
        """
        Give the scheduler a source of dε/dλ, the slope of the noise prediction along the probability-flow ODE.

        Args:
            source:
                A model with a head (such as [`GenieUNet2DModel`]), an [`ExactSlope`], any callable
                `source(sample, noise_prediction, timestep, *, step, history_slope) -> slope`, or `None` to detach.
                `timestep` is a float, `step` the step in λ that is about to be taken (infinite for the last one to
                clean data), `history_slope` the slope through this and the previous prediction, `None` at the
                start. A source that also takes `model_output` is given what `step` was, without variances. The slope
                has the shape of `sample`.

                Attributes of a source, all optional: `term`, what it is the source of, `"slope"` or `"residual"` (the
                default of one with `tables`); `tables`, learned tables as in the configuration, whose own go
                before them; `bind(process, prediction_type)`, called whenever the timesteps are set, which raises if
                the two do not fit; `acquire()`, called now, and `release()`, when the source is replaced or the
                scheduler is gone; `begin()`, called when a run begins, and `forget()`, when a step is taken without
                the source.

        An attachment is not part of the configuration: attach again after `from_config` or loading. A copy of the
        scheduler shares it.

        Raises:
            ValueError: If `source` is no source, does not fit, or the scheduler can use none.
        """
        source = getattr(source, "slope_source", source)
        if isinstance(source, ModelMixin):
            raise ValueError(
                f"`source` must know slopes, which a plain `{type(source).__name__}` does not: add a head with "
                "`GenieUNet2DModel.from_unet` or `GenieUNet2DConditionModel.from_unet`, or attach `ExactSlope(unet)`."
            )
        if source is not None and not callable(source):
            raise ValueError(f"`source` must be callable or have a `slope_source`, got {type(source).__name__}.")
        if source is not None and not self.takes_source:
            raise ValueError(
                f"`{type(self).__name__}` takes no slope source: its steps weigh predictions alone. Attach `source` "
                "to a scheduler with `prediction_type`, such as `GenieScheduler`."
            )
        self._bind(source)
        previous, self._attachment = self._attachment, None if source is None else Attachment(source)
        try:
            if self.num_inference_steps is not None:  # a run under way goes on as if it started here
                self._build(self._built_for if self._step_index is None else self._step_index)
        except ValueError:
            self._attachment = previous
            raise

    @property
    def takes_source(self) -> bool:
        """Whether a source can be attached: it must be told what the model predicts."""
        return "prediction_type" in self.config

    @property
    def _slope_source(self) -> Any:
        return None if self._attachment is None else self._attachment.source

    @property
    def _term(self) -> str | None:
        """What the attached source is the source of."""
        source = self._slope_source
        if source is None:
            return None
        return getattr(source, "term", "slope" if getattr(source, "tables", None) is None else "residual")

    @property
    def _has_slopes(self) -> bool:
        return self._term == "slope"

    def _tell(self, event: str):
        """Call the method `event` of the source, if it has one."""
        getattr(self._slope_source, event, lambda: None)()

    def _bind(self, source: Any):
        if hasattr(source, "bind"):
            source.bind(self.process, self.config.get("prediction_type", "epsilon"))

    def _ask(self, timestep: float, term, index, sample, output, noise_prediction, history_slope) -> torch.Tensor:
        options = {"model_output": output} if self._attachment.takes_output else {}
        slope = self._slope_source(
            sample,
            noise_prediction,
            timestep,
            step=float(self.lambdas[index + 1] - self.lambdas[index]),
            history_slope=history_slope,
            **options,
        )
        if slope.shape != sample.shape:
            raise ValueError(
                f"The slope source must return the shape {tuple(sample.shape)} of `sample`, got {tuple(slope.shape)}."
            )
        return slope


def _takes(function: Any, name: str) -> bool:
    """Whether `function` has an argument called `name`."""
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # nothing is known of it
        return False
