"""Calibration: samplers learned for any pipeline, by forward passes alone."""

from .calibrate import Calibration, calibrate

__all__ = ["Calibration", "calibrate"]
