from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command import run_here
from tiny import VOCAB, tiny_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ifr_fast import Tracer
from ifr_fast.cli import options

# One token each. Terminals act on some of these, and rich on the brackets.
CHARACTERS = ["<unk>", *"abcdefghijklmnopqrstuvwxyz [/]0123456789:;m", "\x1b", "\n", "\r", "\x07",
              "\x9b", "\u202e"]  # fmt: skip
TEMPLATE = "{% for m in messages %}{{ m.role[:1] }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 97 tokens, one a character, with a tokenizer and a chat template."""
    path = tmp_path_factory.mktemp("tiny")
    tiny_model("llama").save_pretrained(path)
    vocabulary = {c: i for i, c in enumerate(CHARACTERS)}
    vocabulary |= {f"<{i}>": i for i in range(len(CHARACTERS), VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_tracer(tiny_dir: Path) -> Tracer:
    return Tracer.from_pretrained(tiny_dir)


@pytest.fixture(scope="session")
def opened() -> dict[tuple[str | None, str, str | None], Tracer]:
    """Tracers that commands have opened, by model, implementation and memory limit."""
    return {}


@pytest.fixture
def ifr(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_dir: Path,
    opened: dict[tuple[str | None, str, str | None], Tracer],
) -> Any:
    """Runs the command in this process. The tiny model is opened once for all tests."""
    open_tracer = options.open_tracer

    def open_once(
        model: str | None, impl: str, max_memory: str | None = None, subfolder: str | None = None
    ) -> Tracer:
        if model != str(tiny_dir) or subfolder is not None:
            return open_tracer(model, impl, max_memory, subfolder)
        key = model, impl, max_memory
        if key not in opened:
            opened[key] = open_tracer(*key)
        return opened[key]

    monkeypatch.setattr(options, "open_tracer", open_once)
    return lambda *args, stdin=b"": run_here(monkeypatch, capsys, *args, stdin=stdin)


@pytest.fixture
def trace(ifr: Any, tiny_dir: Path) -> Any:
    """Runs `trace` with the tiny model."""
    return lambda *args, **kwargs: ifr("trace", "--model", tiny_dir, *args, **kwargs)
