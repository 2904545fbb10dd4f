"""Samplers as values, and the engine that runs them: free of diffusers."""

from .engine import Plan, run, step
from .parametrisation import Parametrisation
from .table import Levels, Row, Table, build

__all__ = ["Levels", "Parametrisation", "Plan", "Row", "Table", "build", "run", "step"]
