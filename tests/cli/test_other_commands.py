"""`ifr-fast plan`, `doctor` and `circuits`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command import assert_one_error
from tiny import tiny_model

from ifr_fast import Tracer, __version__


def test_plans_are_printed(ifr: Any, tiny_dir: Path) -> None:
    here = ifr("plan", 96, "--model", tiny_dir)
    assert here.code == 0, here.err
    assert "96 tokens, in one pass" in here.out
    assert "recording takes about" in here.out
    assert ifr("plan", 96, "--model", tiny_dir, "--max-memory", "1MB").code == 2
    on_paper = ifr("plan", 4096, "--config", tiny_dir, "--device-memory", "4GB")
    assert on_paper.code == 0, on_paper.err
    assert "fits into 4 GB" in on_paper.out
    refused = ifr("plan", 4096, "--config", tiny_dir, "--device-memory", "10MB")
    assert refused.code == 2
    for options in (
        ("--device-memory", "1GB"),
        ("--config", tiny_dir, "--max-memory", "1GB"),
        ("--config", tiny_dir / "none"),
        ("--config", tiny_dir, "--dtype", "int8"),
    ):
        assert ifr("plan", 96, *options).code == 2
    assert_one_error(ifr("plan", 97, "--model", tiny_dir), "tokens: 97", "context of 96")


def test_plans_on_paper_say_what_they_cannot_read(ifr: Any, tiny_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{broken")
    for path in (tmp_path, tmp_path / "config.json"):
        assert_one_error(ifr("plan", 96, "--config", path), f"--config: {path}")
    for dtype in ("tensor", "float8_e5m2", "int8"):
        assert_one_error(ifr("plan", 96, "--config", tiny_dir, "--dtype", dtype), "--dtype")


def test_doctor(ifr: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = "a" * 90
    monkeypatch.setenv("IFR_FAST_CACHE", str(tmp_path / "models" / long))
    monkeypatch.delenv("IFR_FAST_IMPL", raising=False)
    ran = ifr("doctor")
    assert ran.code == 0
    assert ran.err == ""
    # A row is a line in a pipe, however long, so that it can be searched for.
    lines = [re.split(r"\s{2,}", line.rstrip(), maxsplit=1) for line in ran.out.splitlines()]
    assert [line for line in lines if len(line) != 2 or not line[0]] == []
    rows = dict(lines)
    assert rows["ifr-fast"] == __version__
    assert rows["torch"] == torch.__version__
    assert rows["cache"] == str(tmp_path / "models" / long)
    assert "fetched on first use" in rows["default model"]
    chosen = Tracer(tiny_model("llama")).impl
    assert rows["on cpu"].startswith(f"{chosen}, the fastest that can run here")
    assert "\x1b" not in ran.out
    asked = ifr("doctor", "--impl", "reference").out
    assert re.search(r"on cpu\s+reference, asked for", asked)
    assert not (tmp_path / "models").exists()
    monkeypatch.setattr("ifr_fast.cli.doctor.find_spec", lambda _: None)
    plot = next(x for x in ifr("doctor").out.splitlines() if x.startswith("extra plot"))
    assert plot.split(maxsplit=2)[2].rstrip() == "missing matplotlib: pip install 'ifr-fast[plot]'"
    assert_one_error(ifr("doctor", "--impl", "nonsense"), "--impl: expected one of auto")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--out", "file"), ("--out: file", "expected a folder")),
        (("--out", "new", "--threshold", "nan"), ("threshold", "nan")),
        (("--out", "new", "--model", "./missing"), ("no directory",)),
    ],
)
def test_circuits_refuses_bad_options_and_makes_no_folder(
    ifr: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: Any,
    words: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert_one_error(ifr("circuits", *options), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["plan", "0"], "tokens: expected at least 1, got 0"),
        (["plan", "9" * 30], "tokens: expected at most 2147483647"),
        (["plan", "8", "--config", "no"], "--config: no file or directory 'no'"),
        (["plan", "8", "--max-memory", "1e9"], "--max-memory: expected a size"),
        (["bench", "-n", "9" * 30], "--lengths: expected numbers of tokens"),
        (["bench", "-n", "0"], "--lengths: expected numbers of tokens"),
        (["bench", "--repeat", "9" * 30], "--repeat: expected at most 2147483647"),
        (["survey", "x", "--out", "o", "--max-tokens", "9" * 30], "max_tokens: expected at most"),
        (["survey", "x", "--out", "o", "--thresholds", "nan"], "thresholds: expected a number"),
        (["survey", "", "--out", "o"], "inputs: expected the path"),
        (["report", "no", "--seed", "-1"], "seed: expected 0 to 18446744073709551615, got -1"),
        (["report", "no", "--threshold", "nan"], "threshold: expected a number from 0 to 1"),
        (["circuits", "--out", "o", "--seed", "-1"], "seed: expected 0 to"),
        (["circuits", "--out", "o", "-n", "9" * 30], "n_prompts: expected at most"),
        (["circuits", "--out", "o", "--keep-threshold", "nan"], "thresholds: expected a number"),
        (["circuits", "--out", "o", "--task", "x"], "task: expected 'ioi' or 'greater-than'"),
    ],
    ids=lambda x: " ".join(x)[:40] if isinstance(x, list) else "",
)
def test_numbers_out_of_range(
    ifr: Any, args: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are refused before a model is opened: none of these commands could open one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IFR_FAST_CACHE", "/dev/null/cache")
    assert_one_error(ifr(*args), words)
    assert list(tmp_path.iterdir()) == []
