"""Texts, options and models that are refused, each in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command import assert_one_error
from tiny import VOCAB, tiny_model
from transformers import BertConfig, BertLMHeadModel


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([""], ["text: is empty"]),
        (["abc", "--position", "3"], ["position: expected -3 to 2, got 3"]),
        (["abc", "--position", "-4"], ["position: expected -3 to 2, got -4"]),
        (["abc", "--threshold", "-0.1"], ["threshold", "0 to 1", "-0.1"]),
        (["abc", "--threshold", "1.5"], ["threshold", "0 to 1", "1.5"]),
        (["abc", "--threshold", "nan"], ["threshold", "0 to 1", "nan"]),
        (["a" * 97], ["97 tokens", "96"]),
        (["abc", "--impl", "nonsense"], ["impl", "eager", "'nonsense'"]),
        (["abc", "--top-paths", "0"], ["--top-paths: expected at least 1, got 0"]),
        (["abc", "--top-paths", "9" * 21], ["--top-paths: expected at most 2147483647"]),
        (["caf\udce9"], ["text: character 3", "not UTF-8"]),
        (["abc", "--recording", "\udce9"], ["path: character 0", "not UTF-8"]),
        (["abc", "--file", "x"], ["text: give one of"]),
        (["abc", "--chat", "x"], ["text: give one of"]),
        (["-", "--file", "x"], ["text: give one of"]),
        (["--file", "missing.txt"], ["--file: missing.txt", "No such file"]),
        (["--file", "."], ["--file: . cannot be read", "directory"]),
        (["--file", "/dev/zero"], ["--file: /dev/zero has more than 64 MiB"]),
        (["--chat", "missing.json"], ["--chat: missing.json", "No such file"]),
        (["abc", "--recording", "."], ["--recording: .", "no file"]),
        (["abc", "--recording", "/dev/null"], ["--recording: /dev/null", "no file"]),
        (["abc", "--recording", "no/such"], ["--recording: no/such", "no directory"]),
        (["abc", "--recording", "o"], ["--recording: o", "another file"]),
        (["abc", "--max-memory", "9" * 400], ["--max-memory: expected a size"]),
        (["abc", "--model", ""], ["model: is empty"]),
    ],
    ids=lambda x: " ".join(x)[:40],
)
def test_bad_input(
    trace: Any, args: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outputs = ["--json", "o.json", "--html", "o.html", "--png", "o.png", "--save", "o"]
    assert_one_error(trace(*outputs, *args), *words)
    assert list(tmp_path.iterdir()) == []


def test_standard_input_that_is_empty_or_broken(trace: Any, tmp_path: Path) -> None:
    assert_one_error(trace("-"), "text: is empty")
    assert_one_error(trace("-", stdin=b"caf\xe9"), "text: standard input is not UTF-8")
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    assert_one_error(trace("--file", latin), "latin.txt is not UTF-8")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "not JSON"),
        (b"{nope", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b'"text"', "list of {role, content}"),
        (b'{"role": "user", "content": "a"}', "list of {role, content}"),
        (b'["a"]', "list of {role, content}"),
        (b"[]", "empty"),
        (b'[{"role": "user"}]', "role and content"),
        (b'[{"role": "user", "content": 3}]', "role and content"),
        (b'[{"role": "user", "content": "a"}, {}]', "role and content"),
        (b"[" * 100_000, "not JSON"),
        (b'[{"role": "user", "content": "\\ud800"}]', "text: message 0: character 0"),
        (b'[{"role": "\\ud800", "content": "a"}]', "text: message 0: character 0"),
    ],
    ids=lambda x: repr(x)[:30],
)
def test_bad_chat_files(trace: Any, tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "chat.json"
    path.write_bytes(content)
    assert_one_error(trace("--chat", path), word)
    assert_one_error(trace("--chat", "-", stdin=content), word)


def test_models_that_cannot_be_opened(ifr: Any, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    file = tmp_path / "file"
    file.write_text("x")
    encoder = tmp_path / "encoder"
    torch.manual_seed(0)
    config = BertConfig(vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2,
                        num_attention_heads=4, intermediate_size=40)  # fmt: skip
    BertLMHeadModel(config).save_pretrained(encoder)
    poisoned = tmp_path / "poisoned"
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    model.save_pretrained(poisoned)
    broken = tmp_path / "broken"
    tiny_model("llama").save_pretrained(broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    unconfigured = tmp_path / "unconfigured"
    unconfigured.mkdir()
    (unconfigured / "config.json").write_text("{broken")
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text('{"model_type": "nonsense"}')
    for path, words in {
        tmp_path / "missing": ["no directory"],
        empty: ["no config.json"],
        file: ["no directory"],
        encoder: ["later positions"],
        poisoned: ["model.layers.1.mlp.up_proj.weight", "NaN"],
        broken: ["cannot be loaded"],
        unconfigured: ["cannot be loaded"],
        unknown: ["cannot be loaded"],
    }.items():
        ran = ifr("trace", "--model", path, "abc", "--json", tmp_path / "out.json")
        assert_one_error(ran, "model: ", *words)
        assert not (tmp_path / "out.json").exists()


CONFIGS: dict[str, Any] = {
    "null": None,
    "negative": {"hidden_size": -1},
    "headless": {"num_attention_heads": 0},
    "strings": {"hidden_size": "x"},
    "uneven": {"num_key_value_heads": 5},
    "huge": {"hidden_size": 6 << 40},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_of_no_model(ifr: Any, tiny_dir: Path, tmp_path: Path, name: str) -> None:
    """One line for a model's directory and for a plan, whatever transformers makes of it."""
    model = tmp_path / name
    shutil.copytree(tiny_dir, model)
    config = json.loads((model / "config.json").read_text())
    change = CONFIGS[name]
    (model / "config.json").write_text(json.dumps(None if change is None else config | change))
    assert_one_error(ifr("trace", "--model", model, "abc"), "model: ", "cannot be loaded: ")
    if name not in ("uneven", "huge"):  # these are models, of which a plan can be made
        assert_one_error(ifr("plan", "8", "--config", model), "config: ")


def test_an_encoder_without_a_language_model_head(ifr: Any, tmp_path: Path) -> None:
    """A directory that says of itself that it is no causal language model."""
    config = {"model_type": "vit", "architectures": ["ViTModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_one_error(ifr("trace", "--model", tmp_path, "abc"), "not a causal language model")


def test_text_for_a_model_without_a_tokenizer(ifr: Any, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    assert_one_error(ifr("trace", "--model", tmp_path, "abc"), "tokenizer")


def test_options_that_are_no_numbers(trace: Any) -> None:
    for option in ("--position", "--threshold", "--top-paths"):
        ran = trace("abc", option, "x")
        assert ran.code == 2
        assert ran.out == ""
        assert option in ran.err
        assert "Traceback" not in ran.err
