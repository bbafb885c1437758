"""What ifr_fast raises. Wrong arguments are plain `ValueError`s that name the argument."""


class IfrError(Exception):
    """Base of all errors that are not a wrong argument."""


class UnsupportedArchitectureError(IfrError):
    """A model whose decomposition into parts could not be shown to be right."""


class MemoryBudgetError(IfrError):
    """A text whose recording does not fit into the memory at hand."""


class FormatError(IfrError):
    """A file that is truncated, foreign, or of another format version."""
