"""Conversations, special tokens and subfolders on the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command import assert_one_error
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from ifr_fast import RouteGraph

TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}"
    "{% for m in messages %}{{ m.role[:1] }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)
MESSAGES = [
    {"role": "user", "content": [{"type": "text", "text": "some "}, {"type": "text", "text": "x"}]},
    {"role": "assistant", "content": "no"},
]


@pytest.fixture(scope="module")
def nested(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose folder `inner` holds the tiny model. Its tokenizer puts an `a` in front."""
    path = tmp_path_factory.mktemp("nested")
    shutil.copytree(tiny_dir, path / "inner")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path / "inner")
    first = processors.TemplateProcessing("a $A", special_tokens=[("a", 1)])
    tokenizer.backend_tokenizer.post_processor = first
    tokenizer.bos_token, tokenizer.chat_template = "a", TEMPLATE
    tokenizer.save_pretrained(path / "inner")
    return path


@pytest.fixture
def tokens(ifr: Any, nested: Path, tmp_path: Path) -> Any:
    """The text of the tokens that `trace` explains."""

    def traced(*args: Any, stdin: bytes = b"") -> str:
        out = tmp_path / "graph"
        ran = ifr("trace", "--model", nested, "--subfolder", "inner", *args, "--save", out,
                  stdin=stdin)  # fmt: skip
        assert ran.code == 0, ran
        return "".join(RouteGraph.load(out).tokens)

    return traced


def test_conversations_with_tools_and_parts(tokens: Any, tmp_path: Path) -> None:
    chat = tmp_path / "chat.json"
    chat.write_text(json.dumps({"messages": MESSAGES, "tools": [{"name": "look"}]}))
    assert tokens("--chat", chat) == "[look]u: some x\na: no\na: "
    assert tokens("--chat", chat, "--continue-final-message") == "[look]u: some x\na: no"
    assert tokens("--chat", "-", stdin=json.dumps(MESSAGES).encode()) == "u: some x\na: no\na: "


def test_special_tokens(tokens: Any) -> None:
    assert tokens("bcd") == "abcd"
    assert tokens("bcd", "--no-special-tokens") == "bcd"
    with pytest.warns(UserWarning, match="begins with two a"):
        assert tokens("abcd") == "aabcd"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["abc", "--continue-final-message"], "--continue-final-message: goes with --chat"),
        (["--chat", "x", "--no-special-tokens"], "--no-special-tokens: goes with a text"),
        (["abc", "--subfolder", "missing"], "model: no directory"),
    ],
)
def test_options_that_do_not_fit(ifr: Any, nested: Path, args: list[str], words: str) -> None:
    assert_one_error(ifr("trace", "--model", nested, *args), words)


@pytest.mark.parametrize(
    "command",
    [
        "trace abc",
        "generate abc",
        "bench",
        "plan 9",
        "survey a.txt --out out",
        "circuits --out out",
    ],
)
def test_a_subfolder_needs_a_model(
    ifr: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = ifr(*command.split(), "--subfolder", "x")
    assert_one_error(ran, "--subfolder: goes with --model")
    assert not list(tmp_path.iterdir())


def test_generate_takes_them_too(ifr: Any, nested: Path, tmp_path: Path) -> None:
    chat = tmp_path / "chat.json"
    chat.write_text(json.dumps(MESSAGES))
    model = ("--model", nested, "--subfolder", "inner", "-n", 1, "--json", "-")
    for args, expected in (
        (["--chat", chat, "--continue-final-message"], "u: some x\na: no"),
        (["bcd", "--no-special-tokens"], "bcd"),
    ):
        ran = ifr("generate", *args, *model)
        assert ran.code == 0, ran
        assert "".join(json.loads(ran.out)["graph"]["tokens"]) == expected
