"""`ifr-fast doctor`."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from importlib.util import find_spec
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .._version import __version__


def doctor(
    impl: Annotated[str, typer.Option(help="Implementation to report on.")] = "auto",
) -> None:
    """Print what is installed, which implementation would run and why, and the model cache."""
    import torch

    from ..model.pretrained import DEFAULT_NAME, cache_dir, default_model_dir
    from ..scoring.implementations import IMPLEMENTATIONS, explain_impl

    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"--impl: expected one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("ifr-fast", __version__)
    table.add_row("Python", f"{platform.python_version()} on {platform.platform()}")
    for package in ("torch", "transformers", "triton", "safetensors", "numpy"):
        table.add_row(package, _installed(package))
    for extra, packages in {
        "plot": ("matplotlib",),
        "networkx": ("networkx",),
        "tables": ("pandas", "pyarrow"),
        "survey": ("pyarrow",),
        "report": ("matplotlib", "scipy", "sklearn"),
        "ray": ("ray",),
        "circuits": ("matplotlib", "captum", "flashtrace"),
    }.items():
        missing = [p for p in packages if find_spec(p) is None]
        state = f"missing {', '.join(missing)}: pip install 'ifr-fast[{extra}]'"
        table.add_row(f"extra {extra}", state if missing else "installed")
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    table.add_row("GPU", cuda)
    table.add_row(
        "CPU", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        table.add_row(f"on {device}", explain_impl(impl, torch.device(device)))
    table.add_row("cache", str(cache_dir()))
    present = (default_model_dir() / "config.json").is_file()
    state = "in the cache" if present else "fetched on first use (93 MB)"
    table.add_row("default model", f"{DEFAULT_NAME}, {state}")
    width = None if sys.stdout.isatty() else 1000  # in a pipe, each row is one line
    Console(highlight=False, markup=False, width=width).print(table)


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
