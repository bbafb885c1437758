"""The layout of the code (docs/design.md, section 4): one-way imports, and readable files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

from paths import ROOT

PACKAGE, KERNELS = ROOT / "ifr_fast", ROOT / "kernels"

# Bottom first: a module imports from the rows below its own, and from its own package.
ROWS = [
    {"_version", "arguments", "errors", "kernels", "progress"},
    {"storage", "tokens"},
    {"characters", "model"},
    {"graph"},
    {"export", "recording"},
    {"scoring"},
    {"routes"},
    {"drilldown", "generation"},
    {"tracer"},
    {"benchmark"},
    {"circuits", "compat", "survey"},
    {"cli"},
]
RANK = {name: rank for rank, row in enumerate(ROWS) for name in row}
LONGEST_FILE = 460  # lines
MOST_ON_THE_FIRST_FLOOR = 10  # modules beside the packages
# Kernels that are no implementation: importing them compiles and probes nothing.
LIGHT_KERNELS = {"breakpoints", "contract", "neurons", "precision", "recurrences", "rows"}


class Import(NamedTuple):
    module: str  # dotted and absolute
    name: str  # imported from it; "" where the module itself is
    called: bool  # within a function


def imports(path: Path, package: str) -> Iterator[Import]:
    """All imports of a file that is in `package`, those for type checkers included."""

    def of(node: ast.AST, called: bool) -> Iterator[Import]:
        match node:
            case ast.Import(names=names):
                for name in names:
                    yield Import(name.name, "", called)
            case ast.ImportFrom(module=module, names=names, level=level):
                parts = package.split(".")
                base = ".".join(parts[: len(parts) - level + 1]) if level else ""
                full = ".".join(part for part in (base, module) if part)
                for name in names:
                    yield Import(full, name.name, called)
        inside = called or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            yield from of(child, inside)

    yield from of(ast.parse(path.read_text()), False)


def modules() -> dict[str, tuple[Path, str]]:
    """Every module of the package but kernels', by its dotted name: its file and its package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] == "kernels":
            continue
        package = ".".join(["ifr_fast", *parts[:-1]])
        found[package if parts[-1] == "__init__" else f"{package}.{parts[-1]}"] = path, package
    return found


def target_of(found: Import, known: dict[str, tuple[Path, str]]) -> str:
    """The module that an import reaches: "from . import x" reaches the module x."""
    inner = f"{found.module}.{found.name}"
    return inner if inner in known else found.module


def test_every_module_has_a_rank() -> None:
    names = {module.split(".")[1] for module in modules() if "." in module}
    assert names == set(RANK) - {"kernels"}
    found = list(imports(PACKAGE / "tracer.py", "ifr_fast"))
    assert Import("ifr_fast.model.opening", "open_decoder", False) in found
    assert Import("ifr_fast.model.pretrained", "load", True) in found


def test_arrows_run_one_way() -> None:
    wrong = []
    known = modules()
    for module, (path, package) in known.items():
        if module == "ifr_fast":
            continue  # its names come on demand
        own = module.split(".")[1]
        for found in imports(path, package):
            parts = target_of(found, known).split(".")
            if parts == ["ifr_fast"] and found.name != "__version__":
                wrong.append(f"{module} imports {found.name} from the root")
            if parts[0] != "ifr_fast" or len(parts) == 1 or parts[1] == own:
                continue
            if RANK[parts[1]] >= RANK[own]:
                wrong.append(f"{module} imports {'.'.join(parts)}")
    assert wrong == []


def test_imports_run_in_no_circle() -> None:
    known = modules()
    arrows: dict[str, set[str]] = {}
    for module, (path, package) in known.items():
        if module == "ifr_fast":
            continue
        reached = {target_of(found, known) for found in imports(path, package)}
        arrows[module] = (reached & set(known)) - {module, "ifr_fast"}
    assert sum(map(len, arrows.values())) > 200
    TopologicalSorter(arrows).prepare()  # raises CycleError, which names the circle


def test_files_stay_readable() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {path.name: n for path, n in lengths.items() if n > LONGEST_FILE} == {}
    assert len([path for path in lengths if path.parent == PACKAGE]) <= MOST_ON_THE_FIRST_FLOOR


def test_kernels_stand_alone() -> None:
    wrong = []
    files = sorted(KERNELS.rglob("*.py"))
    assert {"contract.py", "eager.py", "reference.py"} <= {path.name for path in files}
    for path in files:
        relative = path.relative_to(KERNELS)
        package = ".".join(["kernels", *relative.parts[:-1]])
        for found in imports(path, package):
            root, _, rest = f"{found.module}.{found.name}".partition(".")
            if root in ("ifr_fast", "transformers"):
                wrong.append(f"{relative} imports {found.module}")
            if root == "kernels" and rest.split(".")[0] == "reference":
                wrong.append(f"{relative} imports {found.module}")
        # Out of kernels/ there is nothing: the folder is no package of its own.
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level > len(relative.parts):
                wrong.append(f"{relative} imports from above")
    assert wrong == []


def test_implementations_are_imported_on_demand() -> None:
    for module, (path, package) in modules().items():
        for found in imports(path, package):
            parts = f"{found.module}.{found.name}".split(".")
            if parts[:2] == ["ifr_fast", "kernels"] and parts[2] not in LIGHT_KERNELS:
                assert found.called, f"{module} imports {found.module} when it is itself imported"
