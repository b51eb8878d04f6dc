"""Errors that end a script with one sentence."""


class ConfigError(ValueError):
    """Something that cannot be run; the message is one sentence."""


class DataError(Exception):
    """Files that are missing, or not as they should be; the message is one sentence."""


class RunError(Exception):
    """A run that cannot start or go on; the message is one sentence."""
