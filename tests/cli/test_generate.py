"""`ifr-fast generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command import assert_one_error

from ifr_fast import Tracer
from ifr_fast.progress import printable


def test_generate_prints_and_writes_each_token(
    ifr: Any, tiny_dir: Path, tiny_tracer: Tracer, tmp_path: Path
) -> None:
    out = tmp_path / "steps.jsonl"
    options = ("-m", tiny_dir, "-n", 4, "-t", 0.05, "--json", out)
    ran = ifr("generate", "some words here", *options)
    assert ran.code == 0, ran.err
    steps = list(tiny_tracer.generate("some words here", max_new_tokens=4, threshold=0.05))
    printed = ran.out.splitlines()
    documents = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(printed) == len(documents) == len(steps)
    for line, document, step in zip(printed, documents, steps, strict=True):
        assert line.startswith(f"“{printable(step.token)}” ({step.probability:.2f})  from “")
        best = int(step.graph.token_importance().argmax())
        assert f"@{best} {float(step.graph.token_importance()[best]):.2f}" in line
        assert document["token_id"] == step.token_id
        assert document["graph"] == json.loads(step.graph.to_json())


def test_generate_draws_by_seed(ifr: Any, tiny_dir: Path) -> None:
    def drawn(seed: int) -> str:
        ran = ifr("generate", "words", "-m", tiny_dir, "--temperature", 2, "--seed", seed, "-n", 4)
        assert ran.code == 0, ran.err
        return ran.out

    of_seed = [drawn(seed) for seed in range(4)]
    assert drawn(1) == of_seed[1]
    assert len(set(of_seed)) > 1


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("-n", 0), "--max-new-tokens"),
        (("--temperature", -1), "--temperature"),
        (("-k", 0), "--sources"),
        (("-t", 2), "threshold"),
        (("--temperature", "nan"), "--temperature"),
        (("--temperature", "inf"), "--temperature"),
        (("--seed", -1), "--seed"),
        (("--seed", 1 << 64), "--seed"),
    ],
)
def test_generate_refuses_bad_options(ifr: Any, tiny_dir: Path, options: Any, word: str) -> None:
    assert_one_error(ifr("generate", "words", "-m", tiny_dir, *options), word)
