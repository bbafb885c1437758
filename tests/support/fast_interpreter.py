"""Triton's interpreter, faster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def patched_once_a_launch() -> Iterator[None]:
    """`patched`, for all tests."""
    with patched():
        yield


@contextmanager
def patched() -> Iterator[None]:
    """Triton's interpreter patches triton.language at every call of a device function, a third of
    its time. Once a launch and module is enough.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        yield
        return
    patched: set[int] = set()
    launch = interpreter.GridExecutor.__call__

    def launch_unpatched(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = id(self.fn.__globals__)
        if module not in patched:
            patched.add(module)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_unpatched)
        monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield
