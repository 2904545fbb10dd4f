"""Calibration: samplers learned for any pipeline, by forward passes alone."""

from .calibrator import Calibration, calibrate

__all__ = ["Calibration", "calibrate"]
