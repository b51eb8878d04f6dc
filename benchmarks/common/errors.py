"""Errors that end a script with one sentence."""


class ConfigError(ValueError):
    """A configuration that cannot be run. The message is one sentence."""


class DataError(Exception):
    """Missing or invalid data files. The message is one sentence."""


class RunError(Exception):
    """A run that cannot start or continue. The message is one sentence."""
