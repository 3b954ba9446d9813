"""Intervals, paired comparisons, calibration."""
