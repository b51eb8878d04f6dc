"""Initialisation of cores: the variance solver, and random draws with the variances it returns."""
