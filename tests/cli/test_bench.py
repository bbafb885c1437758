"""`ifr-fast bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command import assert_one_error
from throughput import check
from tiny import tiny_model


@pytest.fixture
def bench(ifr: Any, tiny_dir: Path) -> Any:
    """Runs `bench` with the tiny model."""
    return lambda *args: ifr("bench", "--model", tiny_dir, *args)


def test_the_command(bench: Any, tiny_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    code, out, err = bench("--lengths", "32, 8,32", "--repeat", 1, "--json", path)
    assert code == 0, err
    assert err.splitlines() == [f"wrote {path}"]
    assert "\x1b" not in out
    document = json.loads(path.read_text())
    check(document, [8, 32])
    assert document["subject"]["model"] == tiny_dir.name
    title, *_ = out.splitlines()
    assert (
        title == f"{tiny_dir.name} in float32, impl {document['subject']['impl']}, attention sdpa"
    )
    header = next(line for line in out.splitlines() if line.startswith("tokens "))
    assert header.split() == ["tokens", "8", "32"]
    rows = [line for line in out.splitlines() if line.startswith("all routes, tokens per second")]
    expected = [f"{result['tokens_per_second']:,.0f}" for result in document["results"]]
    assert [row.split()[-2:] for row in rows] == [expected]


def test_the_command_on_a_file(bench: Any, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("the quick brown fox")
    code, out, err = bench("--file", text, "--lengths", 19, "--repeat", 1, "--impl", "eager")
    assert (code, err) == (0, "")
    assert "impl eager" in out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--lengths", ""], "--lengths: expected numbers of tokens"),
        (["--lengths", "a"], "--lengths: expected numbers of tokens"),
        (["--lengths", "0"], "--lengths: expected numbers of tokens"),
        (["--lengths", "-5"], "--lengths: expected numbers of tokens"),
        (["--lengths", "1.5"], "--lengths: expected numbers of tokens"),
        (["--lengths", "8,,9"], "--lengths: expected numbers of tokens"),
        (["--lengths", "٣"], "--lengths: expected numbers of tokens"),
        (["--lengths", "8,97"], "--lengths: 97 is more than the model's context of 96"),
        (["--repeat", "0"], "--repeat: expected at least 1, got 0"),
        (["--lengths", "8", "--impl", "fast"], "impl: expected one of auto"),
        (["--lengths", "8", "--file", "missing"], "missing"),
        (["--lengths", "8", "--file", "short"], "text: has 3 tokens, expected at least 8"),
        (["--lengths", "8", "--file", "latin"], "latin is not UTF-8"),
        (["--lengths", "8", "--json", "."], "is a directory"),
        (["--lengths", "8", "--json", "missing/out"], "no directory"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_errors_are_one_line(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short").write_text("abc")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    assert_one_error(bench(*args), words)


def test_a_model_without_a_tokenizer(ifr: Any, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    code, out, err = ifr("bench", "--model", tmp_path, "--lengths", 8)
    assert (code, out) == (2, "")
    assert err.splitlines() == ["error: text: the model has no tokenizer"]
