"""What is installed, what importing loads, and which way the arrows between modules run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from paths import ROOT

import ifr_fast

# Kernels that are no implementation.
LIGHT = {"breakpoints", "contract", "neurons", "precision", "recurrences", "rows"}
PACKAGE, KERNELS = ROOT / "ifr_fast", ROOT / "kernels"


def python(*args: Any, cwd: Path, env: dict[str, str] | None = None) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    run = subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        env=environment | (env or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


# Importing


WATCH = """
import builtins, importlib.util, json, sys
asked, own = [], builtins.__import__

def watch(name, globals=None, *args, **kwargs):
    importer = (globals or {}).get("__name__") or ""
    if importer.partition(".")[0] == "ifr_fast":
        asked.append(name)
    return own(name, globals, *args, **kwargs)

builtins.__import__ = watch
import ifr_fast
first = list(sys.modules)
errors = [ifr_fast.IfrError, ifr_fast.FormatError, dir(ifr_fast)]
second = list(sys.modules)
import ifr_fast.tracer
third = list(sys.modules)
names = {name: getattr(ifr_fast, name) for name in ifr_fast.__all__}
spec = importlib.util.find_spec("kernels")
print(json.dumps({
    "package": first, "errors": second, "tracer": third, "asked": asked,
    "names": {name: getattr(x, "__module__", None) for name, x in names.items()},
    "kernels": [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])],
}))
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process saw that imported the package step by step."""
    return json.loads(python("-c", WATCH, cwd=tmp_path_factory.mktemp("elsewhere")))


def assert_not_ours(found: list[str | None]) -> None:
    for path in found:
        assert path is None or ROOT not in Path(path).resolve().parents


def test_import_kernels_never_finds_ours(imported: dict[str, Any]) -> None:
    """It would shadow Hugging Face's library of that name."""
    assert_not_ours(imported["kernels"])


def test_import_kernels_in_the_repository_finds_nothing_of_ours(tmp_path: Path) -> None:
    """A console script has no working directory on its path, as with Python's -P."""
    code = (
        WATCH.partition("import ifr_fast\n")[0]
        + """
spec = importlib.util.find_spec("kernels")
print(json.dumps([] if spec is None else [spec.origin, *spec.submodule_search_locations]))
"""
    )
    assert_not_ours(json.loads(python("-P", "-c", code, cwd=ROOT)))
    assert not (KERNELS / "__init__.py").exists()


def test_the_tests_do_not_find_it_either() -> None:
    assert ROOT not in [Path(p).resolve() for p in sys.path]


def test_importing_the_package_loads_next_to_nothing(imported: dict[str, Any]) -> None:
    heavy = {"torch", "triton", "transformers", "numpy", "rich", "typer", "safetensors"}
    loaded = set(imported["package"])
    assert loaded & heavy == set()
    assert {m for m in loaded if m.startswith("ifr_fast.")} == {"ifr_fast._version"}
    assert set(imported["errors"]) & heavy == set()


def test_the_tracer_loads_no_kernel_and_asks_for_no_triton(imported: dict[str, Any]) -> None:
    """Torch itself may look for Triton; we do only when it is to run."""
    assert {"torch", "ifr_fast.tracer"} <= set(imported["tracer"])
    assert "transformers" in imported["asked"]
    assert not any(name.partition(".")[0] == "triton" for name in imported["asked"])
    kernels = {m.split(".")[2] for m in imported["tracer"] if m.startswith("ifr_fast.kernels.")}
    assert kernels <= LIGHT
    assert not {"networkx", "matplotlib", "typer"} & set(imported["tracer"])


def test_names_come_from_where_they_are_made(imported: dict[str, Any]) -> None:
    assert imported["names"].pop("__version__") is None
    for module in imported["names"].values():
        assert module.startswith("ifr_fast.")
    with pytest.raises(AttributeError, match="'nonsense'"):
        ifr_fast.nonsense  # noqa: B018


# Wheel and sdist


class Built(NamedTuple):
    wheel: Path  # built from the tree
    sdist: Path
    from_sdist: Path  # wheel built from the sdist


def build(kind: str, source: Path, into: Path) -> Path:
    """Without isolation, and without a compiler: the native kernel is optional."""
    into.mkdir()
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(into)!r}))"
    python("-c", code, cwd=source, env={"CC": "false", "CXX": "false"})
    (result,) = into.iterdir()
    return result


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    tmp_path = tmp_path_factory.mktemp("build")
    tree = tmp_path / "tree"
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.split("\0")[:-1]:
        if (ROOT / name).exists():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
    assert (tree / "ifr_fast" / "kernels").is_symlink()
    sdist = build("sdist", tree, tmp_path / "sdist")
    wheel = build("wheel", tree, tmp_path / "wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    return Built(wheel, sdist, build("wheel", unpacked, tmp_path / "from_sdist"))


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


@pytest.mark.parametrize("which", ["wheel", "from_sdist"])
def test_the_wheel_holds_the_package_and_nothing_else(built: Built, which: str) -> None:
    names = names_in(getattr(built, which))
    for name in ("py.typed", "tracer.py", "export/graph.html",
                 "export/explorer.js", "export/route_graph.schema.json",
                 "kernels/eager.py", "kernels/contract.py", "kernels/reference.py",
                 "kernels/breakpoints.py"):  # fmt: skip
        assert f"ifr_fast/{name}" in names
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"ifr_fast"}
    assert not any({"tests", "bench"} & set(name.split("/")) for name in names)
    assert not any("test" in name for name in names)
    assert not any({"web", "node_modules"} & set(name.split("/")) for name in names)
    assert not any(name.endswith(".pyc") for name in names)
    (info,) = tops - {"ifr_fast"}
    assert f"{info}/licenses/LICENSE" in names


def test_both_wheels_are_alike(built: Built) -> None:
    assert names_in(built.wheel) == names_in(built.from_sdist)
    with zipfile.ZipFile(built.wheel) as mine, zipfile.ZipFile(built.from_sdist) as theirs:
        for name in names_in(built.wheel):
            if name.startswith("ifr_fast/"):
                assert mine.read(name) == theirs.read(name), name


def test_every_module_of_the_tree_is_in_the_wheel(built: Built) -> None:
    names = names_in(built.wheel)
    listed = subprocess.run(
        ["git", "ls-files", "ifr_fast/*.py", "kernels/*.py"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert len(listed) > 15
    for name in listed:
        if (ROOT / name).exists():
            assert name.removeprefix("ifr_fast/") in {n.removeprefix("ifr_fast/") for n in names}


def test_the_sdist_can_be_compiled(built: Built) -> None:
    """Sources of the native kernel, which the wheel's build leaves out without a compiler."""
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "setup.py", "LICENSE", "ifr_fast/kernels/eager.py"} <= names
    listed = subprocess.run(
        ["git", "ls-files", "kernels/cpu"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in listed:
        if (ROOT / name).exists():
            assert f"ifr_fast/{name}" in names


def test_the_wheel_works_where_it_is_installed(built: Built, tmp_path: Path) -> None:
    target = tmp_path / "site"
    python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
           "--disable-pip-version-check", "--target", target, built.from_sdist,
           cwd=tmp_path)  # fmt: skip
    code = """
import ifr_fast, ifr_fast.kernels.eager as eager, importlib.util, torch
from ifr_fast.kernels.contract import LayerInputs
one = torch.ones(1, 1, 1)
scores = eager.score_attention(
    LayerInputs(torch.tensor([0]), one[0], 4 * one[0], one, one, one, 3 * one, 1.0), 0.0
)
print(ifr_fast.__file__)
print(eager.__file__)
print(ifr_fast.__version__)
print(scores.residual.item(), scores.edges.weight.tolist())
print(importlib.util.find_spec("kernels"))
"""
    out = python("-c", code, cwd=tmp_path, env={"PYTHONPATH": str(target)}).splitlines()
    assert [Path(out[0]), Path(out[1])] == [
        target / "ifr_fast" / "__init__.py",
        target / "ifr_fast" / "kernels" / "eager.py",
    ]
    assert out[2] == built.wheel.name.split("-")[1]
    assert out[3] == "0.25 [0.75]"
    assert out[4] == "None"
    assert (target / "bin" / "ifr-fast").is_file()
