"""What `ifr-fast bench` and the scripts in bench/ measure with; nothing here depends on time."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCAB, tiny_model, tiny_text
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import ifr_fast.cli
from ifr_fast import Tracer
from ifr_fast.benchmark import (
    TIMED,
    Machine,
    Subject,
    Throughput,
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


@pytest.fixture(scope="module")
def tiny_dir(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("benchmarked")
    tiny_model("llama").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def bench(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Runs `ifr-fast bench` on the tiny model: exit code, standard output, standard error."""

    def run(*args: object, model: Path = tiny_dir) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ifr-fast", "bench", "-m", str(model), *map(str, args)])
        monkeypatch.setenv("COLUMNS", "60")
        monkeypatch.delenv("FORCE_COLOR", raising=False)
        capsys.readouterr()
        code: Any = 0
        try:
            ifr_fast.cli.main()
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code or 0, out, err

    return run


def check(document: dict[str, Any], lengths: list[int]) -> None:
    assert set(document) == {"machine", "subject", "results"}
    assert list(document["machine"]) == list(Machine._fields)
    assert list(document["subject"]) == list(Subject._fields)
    assert [result["n_tokens"] for result in document["results"]] == lengths
    for result in document["results"]:
        assert set(result) == {*Throughput._fields, "units", *RATES}
        assert list(result["units"]) == list(TIMED)
        assert result["units"]["forward"] == 1
        assert result["share_of_forward"] == result["units"]["scoring"]
        numbers = [result[f"{name}_seconds"] for name in TIMED]
        numbers += [*result["units"].values(), *(result[name] for name in RATES)]
        numbers += [result["recording_bytes"], result["repeat"]]
        assert all(math.isfinite(x) and x > 0 for x in numbers)
        for name in ("scoring_bytes", "peak_bytes"):
            assert result[name] is None or result[name] >= 0
        T = result["n_tokens"]
        assert result["tokens_per_second"] == pytest.approx(T / result["trace_all_seconds"])
        assert result["pairs_per_second"] == pytest.approx(
            result["pairs"] / result["scoring_seconds"]
        )


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
    with pytest.raises(ValueError, match="text: has 3 tokens, 4 are to be measured"):
        first_tokens("abc", tokenizer, 4)
    with pytest.raises(ValueError, match="no tokenizer"):
        first_tokens("abc", None, 1)


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
        (["--lengths", "8", "--file", "short"], "text: has 3 tokens, 8 are to be measured"),
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
    code, out, err = bench(*args)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    assert words in err


def test_a_model_without_a_tokenizer(bench: Any, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    code, out, err = bench("--lengths", 8, model=tmp_path)
    assert (code, out) == (2, "")
    assert err.splitlines() == ["error: text: the model has no tokenizer"]
