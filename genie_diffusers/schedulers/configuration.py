"""Configuration keys that a scheduler declares once and shares with all that derive from it."""

import functools
import inspect
from collections.abc import Callable, Mapping

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class SharedConfiguration:
    """
    A `ConfigMixin` whose subclasses write down nothing but the keys that are new, or have another default.

    The constructor of a class takes the keys of all its bases and its own, in that order, and registers them all once,
    in the class that is made. `super().__init__()` in a subclass, with or without arguments, never registers anything:

    ```py
    class MyScheduler(GaussianDiffusionScheduler):
        def __init__(self, order: int = 2, **kwargs):
            super().__init__(**kwargs)
    ```
    """

    _own_init: Callable | None = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls._own_init = cls.__dict__.get("__init__")
        inits = [base.__dict__.get("_own_init") for base in cls.__mro__]
        own = next(filter(None, inits))
        parameters: dict[str, inspect.Parameter] = {}
        for declaration in filter(None, reversed(inits)):
            _, *declared = inspect.signature(declaration).parameters.values()
            parameters |= {parameter.name: parameter for parameter in declared if parameter.kind not in VARIADIC}
        first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        # by name: their order is nobody's but ours
        named = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters.values()]
        signature = inspect.Signature([first, *named])

        @functools.wraps(own)
        def init(self, *args, **kwargs):
            if "_internal_dict" not in vars(self):
                private = {name: value for name, value in kwargs.items() if name.startswith("_")}
                public = {name: value for name, value in kwargs.items() if not name.startswith("_")}
                bound = signature.bind(self, *args, **public)
                given = {name: value for name, value in bound.arguments.items() if name != "self"}
                bound.apply_defaults()
                values = {name: value for name, value in bound.arguments.items() if name != "self"}
                defaulted = sorted(set(values) - set(given))
                # diffusers adds the name when it saves; what is made of this configuration is to know it too.
                own_name = {"_class_name": type(self).__name__, "_use_default_values": defaulted}
                self.register_to_config(**{**private, **values, **own_name})
                args, kwargs = (), given
            own(self, *args, **_accepted(own, kwargs))

        init.__signature__ = signature  # type: ignore[attr-defined]  # what diffusers reads the keys of a configuration from
        cls.__init__ = init  # type: ignore[method-assign]


def _accepted(function, kwargs: Mapping) -> dict:
    """Those of `kwargs` that `function` takes; the others are registered, and nobody else needs them."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(kwargs)
    return {name: value for name, value in kwargs.items() if name in parameters}
