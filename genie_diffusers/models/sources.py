"""What the slope sources of this package have in common: how they learn what a pipeline has called its model with."""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..processes import LinearDiffusion
from .guidance import MAX_CALLS, RunCheck, branch_weights, check_unguided, count_branches

#: counts of holders change here alone; reentrant, since a finalizer may run while it is held
_COUNTING = threading.RLock()
#: one more than are used, by which one sees that there were too many; the newest first
_SLOTS = tuple(f"call_{age}" for age in range(MAX_CALLS + 1))


class ModelCall:
    """What went into one call of a model, what came out, and what else a source reads of it."""

    def __init__(self, sample: Any = None, output: Any = None, read: Any = None):
        self.sample, self.output, self.read = sample, output, read


class _Register:
    """
    The last calls of one thread, as attributes and not as a list: `torch.compile` traces what is written here, and
    would compile anew for every length of a list.
    """

    def __init__(self):
        for name in _SLOTS:
            setattr(self, name, ModelCall())  # not one for all, which a compiled call would check to be the same
        #: of the call in progress, if there is one
        self.in_call = False
        self.features = self.time_embedding = None


class CallRecord:
    """
    The calls of a model since the last step, for each thread by itself.

    Nothing is recorded unless somebody listens, between [`~CallRecord.start`] and [`~CallRecord.stop`]. What is
    recorded is detached from the graph of autograd, unless a listener wants gradients through it. A copy of a record,
    as that of a copied model, is empty, and nobody listens to it.
    """

    def __init__(self):
        self.recording = self.keeps_graph = False
        self._listeners = {False: 0, True: 0}
        self._threads = threading.local()

    def __deepcopy__(self, memo) -> "CallRecord":
        return type(self)()

    def __reduce__(self):
        return type(self), ()

    def start(self, keeps_graph: bool = False):
        """Record from now on, until [`~CallRecord.stop`] is called with the same argument."""
        self._count(keeps_graph, 1)

    def stop(self, keeps_graph: bool = False):
        """Record no longer, if nobody else listens, and forget everything."""
        self._count(keeps_graph, -1)

    def _count(self, keeps_graph: bool, change: int):
        with _COUNTING:
            self._listeners[keeps_graph] += change
            self.keeps_graph = self._listeners[True] > 0
            self.recording = self.keeps_graph or self._listeners[False] > 0
            if not self.recording:
                self._threads = threading.local()
        self.register()  # there before a call is traced

    def register(self) -> Any:
        """That of this thread."""
        if not hasattr(self._threads, "register"):
            self._threads.register = _Register()
        return self._threads.register

    def add(self, call: ModelCall):
        """Remember `call`, and of those before it the last few."""
        register = self.register()
        for age in range(MAX_CALLS, 0, -1):
            setattr(register, _SLOTS[age], getattr(register, _SLOTS[age - 1]))
        register.call_0 = call

    def calls(self) -> list[ModelCall]:
        """The calls of this thread, the last one last; at most one more than `MAX_CALLS`."""
        register = self.register()
        calls = [getattr(register, name) for name in reversed(_SLOTS)]
        return [call for call in calls if call.sample is not None]

    def forget(self):
        """Forget the calls of this thread."""
        self._threads.register = _Register()

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Inside, calls leave nothing behind."""
        kept = self.register()
        self.forget()
        try:
            yield
        finally:
            self._threads.register = kept


class ModelSource:
    """
    A slope source that reads the calls of a model.

    All calls since the last step are the branches of what the scheduler is given, each of one or more equal parts of
    its batch. A new source listens at once. [`GenieScheduler.attach`] calls [`~ModelSource.acquire`], and
    [`~ModelSource.release`] when the source is detached or the scheduler is gone; after the last release, and when the
    source itself is gone, nothing is left of it at the model. A copy of a source is the source itself: a copied
    scheduler goes on with the model that is called.
    """

    #: what a row weighs of this source: dε/dλ, or the "residual" of a step
    term = "slope"

    def __init__(self, record: CallRecord):
        self._record = record
        self._process: Any = None
        self._prediction_type = "epsilon"
        self._check = RunCheck()
        self._holders = 0
        self._stop: Any = None
        self._listen()

    def __deepcopy__(self, memo) -> "ModelSource":
        return self

    def _start(self) -> Callable[[], Any]:
        """Start recording, and return what ends it; that must not refer to the source, whose end it is to see."""
        raise NotImplementedError

    def _listen(self):
        if self._stop is None or not self._stop.alive:
            self._stop = weakref.finalize(self, self._start())
            self._stop.atexit = False

    def acquire(self):
        """Called by a scheduler that is going to ask this source."""
        with _COUNTING:
            self._listen()
            self._holders += 1

    def release(self):
        """Called by a scheduler that asks no longer; the last one ends the recording."""
        with _COUNTING:
            self._holders -= 1
            if self._holders == 0:
                self.remove()

    def remove(self):
        """Leave the model alone and forget its calls, whoever still holds the source."""
        self._stop()

    def bind(self, process: LinearDiffusion, prediction_type: str):
        """Called by the scheduler with the diffusion it samples and what the denoiser predicts."""
        self._process, self._prediction_type = process, prediction_type

    def begin(self):
        """Called by the scheduler when a run begins: on an accelerator its first step is the one that is checked."""
        self._check.begin()

    def forget(self):
        """Called by the scheduler after a step that did not ask, and before a run: those calls are no branches."""
        self._record.forget()

    def _branches(self, sample: torch.Tensor, check_values: bool) -> tuple[list[ModelCall], list[int]]:
        """The calls with `sample`, and the number of parts of each."""
        calls: list[ModelCall] = []
        counts: list[int] = []
        for call in reversed(self._record.calls()):
            try:
                count = count_branches(call.sample, sample, check_values)
            except ValueError:
                if not calls:
                    raise
                break  # what was called before, for another sample
            calls.insert(0, call)
            counts.insert(0, count)
        if len(calls) > MAX_CALLS:
            raise ValueError(
                f"The slope source's model was called more than {MAX_CALLS} times since the last step, which is too "
                "many branches of one prediction. Detach the source (`scheduler.attach(None)`) to sample like this."
            )
        return calls, counts

    @staticmethod
    def _stacked(parts: list[torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        """Outputs of the calls, without variances, as shape `(branches, *sample.shape)`."""
        size = sample.shape[0]
        return torch.cat([part[:, : sample.shape[1]].unflatten(0, (len(part) // size, size)) for part in parts])

    @staticmethod
    def _weights(outputs: torch.Tensor, guided: torch.Tensor, check: bool) -> torch.Tensor | None:
        """The weights of the branches, `None` if there is one; a `ValueError` if they do not make `guided`."""
        if len(outputs) > 1:
            return branch_weights(outputs, guided, check)
        check_unguided(outputs[0], guided, check)
        return None


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """`value` with `function` of the tensors in it, which may lie in tuples, lists and dictionaries."""
    if torch.is_tensor(value):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(map_tensors(function, each) for each in value)
    if isinstance(value, dict):
        return {key: map_tensors(function, each) for key, each in value.items()}
    return value
