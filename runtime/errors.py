"""Errors caused by input, files or the machine.

Each message names the input, what was expected and the remedy. Commands print it and exit with 2;
libraries let it rise. Our own bugs stay ordinary exceptions.
"""


class TinyAlignError(Exception):
    """Base of every error caused by input, files or the machine."""


class AudioError(TinyAlignError):
    """A recording that cannot be used."""


class BundleError(TinyAlignError):
    """A bundle that is incomplete, changed or of another version."""


class UserError(TinyAlignError):
    """A user's projector that is absent or does not belong to this bundle."""


class DataError(TinyAlignError):
    """A data set that cannot be used."""


class BackendError(TinyAlignError):
    """A backend that is not installed or refuses a graph or its inputs."""
