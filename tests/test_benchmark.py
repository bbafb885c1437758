"""The measurements of `ifr-fast bench` and of the scripts in bench/; no test depends on time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from throughput import check
from tiny import VOCAB, tiny_model, tiny_text
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ifr_fast import Tracer
from ifr_fast.benchmark import (
    first_tokens,
    in_turn,
    measure,
    memory_use,
    n_pairs,
    plain_forward,
    prose,
    report,
)

RATES = {"tokens_per_second", "pairs_per_second", "share_of_forward"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    letters = {c: i for i, c in enumerate(["<unk>", *"abcdefghijklmnopqrstuvwxyz "])}
    vocabulary = letters | {f"<{i}>": i for i in range(len(letters), VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_figures_are_positive_and_finite(family: str) -> None:
    tracer = Tracer(tiny_model(family))
    rounds: list[int] = []
    result = measure(tracer, tiny_text(23), repeat=2, on_round=rounds.append)
    assert rounds == [0, 1, 2]
    assert result.pairs == 23 * 24 // 2 * 6 * 3
    assert result.threshold == 0.04
    document = json.loads(json.dumps(report(tracer, [result])))
    check(document, [23])
    assert document["subject"]["impl"] == tracer.impl
    assert document["subject"]["attention"] == "sdpa"
    assert document["machine"]["threads"] == torch.get_num_threads()


def test_pairs_are_those_within_the_window() -> None:
    tracer = Tracer(tiny_model("mistral"))
    T, W = 23, 7
    assert n_pairs(tracer.record(tiny_text(T))) == 6 * 3 * sum(min(t + 1, W) for t in range(T))
    assert n_pairs(tracer.record(tiny_text(5))) == 6 * 3 * 15


def test_repeat_is_checked() -> None:
    with pytest.raises(ValueError, match="repeat: expected at least 1, got 0"):
        measure(Tracer(tiny_model("llama")), tiny_text(5), repeat=0)


def test_the_unit_is_the_model_as_it_is() -> None:
    model = tiny_model("llama").train()
    ids = tiny_text(9)
    logits = plain_forward(model, ids)()
    assert model.training
    assert all(module.training for module in model.modules())
    expected = model.eval()(ids[None]).logits
    assert logits.shape == (1, 1, VOCAB)
    torch.testing.assert_close(logits[0, 0], expected[0, -1].detach(), atol=1e-4, rtol=1e-4)


def test_jobs_run_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """One round is not counted, and a median is not an average."""
    now = 0.0
    order: list[str] = []

    def job(name: str, durations: list[float]) -> Any:
        def run() -> None:
            nonlocal now
            order.append(name)
            now += durations.pop(0)

        return run

    monkeypatch.setattr("ifr_fast.benchmark.time.perf_counter", lambda: now)
    jobs = {"a": job("a", [100, 1, 2, 9]), "b": job("b", [100, 5, 6, 7])}
    assert in_turn(jobs, 3) == {"a": 2, "b": 6}
    assert "".join(order) == "abababab"
    order.clear()
    assert in_turn({"a": job("a", [3])}, 1, warm_up=False) == {"a": 3}
    assert order == ["a"]


def test_memory_of_a_job() -> None:
    n_bytes = 64 << 20

    def job() -> torch.Tensor:
        torch.ones(n_bytes // 4)  # freed again: part of the peak, not of what is held
        return torch.ones(n_bytes // 8)

    use = memory_use(job, torch.device("cpu"))
    assert len(use.result) == n_bytes // 8
    if use.added is not None:
        assert use.held is not None
        assert use.peak is not None
        assert 0.9 * n_bytes < use.added < 2 * n_bytes
        assert 0.4 * n_bytes < use.held < 0.9 * n_bytes
        assert use.peak > use.added


def test_memory_where_the_peak_cannot_be_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, text: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    use = memory_use(lambda: 3, torch.device("cpu"))
    assert (use.result, use.added, use.held) == (3, None, None)
    assert use.peak is None or use.peak > 0


def test_first_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert first_tokens("abc", tokenizer, 2).tolist() == [1, 2]
    assert len(first_tokens(prose(), tokenizer, 5000)) == 5000
    # A text that was cut leaves nothing behind in the tokenizer.
    assert len(tokenizer("a" * 99)["input_ids"]) == 99
    with pytest.raises(ValueError, match="text: has 3 tokens, expected at least 4"):
        first_tokens("abc", tokenizer, 4)
    with pytest.raises(ValueError, match="no tokenizer"):
        first_tokens("abc", None, 1)
