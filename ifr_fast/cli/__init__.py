"""The `ifr-fast` command: one module per subcommand, registered in root.py.

This module imports nothing slow, so that an interrupt during the imports ends quietly too.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from .root import app

__all__ = ["app", "main"]

_INTERRUPTED = 128 + signal.SIGINT


def main() -> None:
    """Runs the command.

    Wrong input, or something that this machine lacks, ends it with one line and exit code 2. A
    reader that closes the pipe ends it quietly with exit code 141, Ctrl-C with 130.
    """
    interrupts = 0

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        nonlocal interrupts
        interrupts += 1
        sys.unraisablehook = lambda _: None  # what the interrupt broke is not reported
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    # Any other handler is the caller's wish.
    handled = before is signal.default_int_handler and (
        threading.current_thread() is threading.main_thread()
    )
    try:
        if handled:
            signal.signal(signal.SIGINT, interrupt)
        from .root import run

        run()
    except BaseException:
        if not interrupts:
            raise
        # An interrupted import may end in another error than KeyboardInterrupt.
        sys.exit(_INTERRUPTED)
    finally:
        if handled:
            signal.signal(signal.SIGINT, before)


def __getattr__(name: str) -> Any:
    if name == "app":
        from .root import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
