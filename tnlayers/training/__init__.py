"""Helpers for training: calibration, learning rates, penalties."""
