"""Helpers of training: calibration, learning rates, penalties."""
