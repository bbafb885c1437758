"""Traces without the closure check, for tests that change what was recorded."""

import pytest


def skip_closure_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores pass whatever their parts add up to, until the test ends."""
    for module in ("frontier", "layer"):
        monkeypatch.setattr(f"ifr_fast.scoring.{module}.check_closure", lambda _: None)
