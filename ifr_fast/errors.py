"""Errors of ifr_fast. A wrong argument raises a `ValueError` that names the argument.

`needing` makes one error of all that the import of another package can raise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class IfrError(Exception):
    """Base of all errors other than wrong arguments."""


class UnsupportedArchitectureError(IfrError):
    """The decomposition of a model into parts could not be verified."""


class MemoryBudgetError(IfrError):
    """The recording of a text does not fit into the available memory."""


class FormatError(IfrError):
    """A file is truncated, foreign, or of another format version."""


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line; its type where it says nothing, or where
    what it says needs it.
    """
    lines = str(error).strip().splitlines()
    name = type(error).__name__
    if isinstance(error, OSError | ValueError) and lines:
        return lines[0]
    return f"{name}: {' '.join(line.strip() for line in lines[:2])}" if lines else name


_MODULE = {"scikit-learn": "sklearn"}  # by package, where the names differ


@contextmanager
def needing(what: str, package: str, remedy: str) -> Iterator[None]:
    """Raises IfrError for whatever an import inside raises, which need not be ImportError.

    The message says what needs the package, what went wrong, and the remedy.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == _MODULE.get(package, package):
            raise IfrError(f"{what} needs {package}, which is not installed: {remedy}") from error
        raise _broken(what, package, remedy, error) from error
    except Exception as error:
        raise _broken(what, package, remedy, error) from error


def _broken(what: str, package: str, remedy: str, error: Exception) -> IfrError:
    said = f"{type(error).__name__}: {error}".strip(": ")
    return IfrError(f"{what} needs {package}, which cannot be imported ({said}): {remedy}")
