"""Errors that end a script with one sentence."""


class ConfigError(ValueError):
    """A configuration that cannot be run. The message is one sentence."""


class BuildError(ConfigError):
    """A network that cannot be built from a valid configuration."""


class DataError(Exception):
    """Missing or invalid data files. The message is one sentence."""


class RunError(Exception):
    """A run that cannot start or continue. The message is one sentence."""


class DivergenceError(RunError):
    """A run whose loss or weights are not finite."""
