"""Errors of ifr_fast. A wrong argument raises a `ValueError` that names the argument."""


class IfrError(Exception):
    """Base of all errors other than wrong arguments."""


class UnsupportedArchitectureError(IfrError):
    """The decomposition of a model into parts could not be verified."""


class MemoryBudgetError(IfrError):
    """The recording of a text does not fit into the available memory."""


class FormatError(IfrError):
    """A file is truncated, foreign, or of another format version."""
