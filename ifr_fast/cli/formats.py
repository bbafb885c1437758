"""The files that `trace` writes of a graph: one table gives options, checks and writers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_type_hints

import typer

from .files import check_outputs, target

if TYPE_CHECKING:
    from ..routes.route_graph import RouteGraph
    from ..tracer import Tracer


class Format(NamedTuple):
    """One kind of file."""

    option: str
    help: str
    write: Callable[[RouteGraph, Tracer, Path], object]
    check: Callable[[], None] | None = None  # raises IfrError without the package that it needs
    folder: bool = False  # the path is a folder, to which files are added


def _text(to_text: Callable[[RouteGraph], str]) -> Callable[[RouteGraph, Tracer, Path], object]:
    def write(graph: RouteGraph, tracer: Tracer, path: Path) -> None:
        from ..storage.files import write_text

        write_text(path, to_text(graph))

    return write


def _png(graph: RouteGraph, tracer: Tracer, path: Path) -> None:
    from ..storage.files import whole_file

    figure = graph.plot()
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _scan(tracer: Tracer) -> str:
    """The model's name, in the manner of Neuronpedia."""
    return Path(tracer.model.config.name_or_path).name.lower() or "unknown"


def _neuronpedia(graph: RouteGraph, tracer: Tracer, path: Path) -> None:
    from ..storage.files import write_text

    write_text(path, graph.to_neuronpedia(scan=_scan(tracer)))


def _check_png() -> None:
    from ..export.plot import check_plot

    check_plot()


def _check_parquet() -> None:
    from ..export.tables import check_parquet

    check_parquet()


FORMATS = (
    Format(
        "--json",
        "Write the graph as JSON ('-', for this and the options below: standard output).",
        _text(lambda graph: graph.to_json()),
    ),
    Format("--html", "Write a page that draws the graph.", _text(lambda graph: graph.to_html())),
    Format("--png", "Write the picture as PNG.", _png, _check_png),
    Format("--save", "Save the graph (safetensors).", lambda graph, _, path: graph.save(path)),
    Format("--graphml", "Write the graph as GraphML.", _text(lambda graph: graph.to_graphml())),
    Format("--dot", "Write the graph in DOT, for Graphviz.", _text(lambda graph: graph.to_dot())),
    Format(
        "--parquet",
        "Write the graph's edges as Parquet, one row per head.",
        lambda graph, _, path: graph.to_parquet(path),
        _check_parquet,
    ),
    Format("--neuronpedia", "Write an attribution graph (Neuronpedia's JSON).", _neuronpedia),
    Format(
        "--neuronpedia-folder",
        "Add the attribution graph to a folder that circuit-tracer's viewer serves.",
        lambda graph, tracer, path: graph.save_neuronpedia(path, scan=_scan(tracer)),
        folder=True,
    ),
)


class Outputs:
    """The formats that a call asks for, and where each goes.

    Raises ValueError or IfrError, before the work, for what cannot be written.
    """

    def __init__(self, paths: Mapping[str, Path | None]) -> None:
        """paths: by parameter name, as `with_outputs` passes them."""
        self.path_of = {form: paths[_parameter(form)] for form in FORMATS}
        folders = {form.option: p for form, p in self.path_of.items() if form.folder}
        self.paths = check_outputs(
            {form.option: p for form, p in self.path_of.items() if not form.folder}, folders
        )

    def check_packages(self) -> None:
        """Raises IfrError if a package is missing that a format needs."""
        for form, path in self.path_of.items():
            if path is not None and form.check is not None:
                form.check()

    def write(self, graph: RouteGraph, tracer: Tracer) -> None:
        """Writes all files."""
        for form, path in self.path_of.items():
            if path is not None:
                with target(path) as file:
                    form.write(graph, tracer, file)


def with_outputs(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command an option per format, in place of its `**` parameter."""
    signature = inspect.signature(command, eval_str=True)
    options = {
        _parameter(form): Annotated[Path | None, typer.Option(form.option, help=form.help)]
        for form in FORMATS
    }
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=of)
        for name, of in options.items()
    ]
    wrapped: Any = command  # typer reads both attributes
    wrapped.__annotations__ = {**get_type_hints(command, include_extras=True), **options}
    wrapped.__signature__ = signature.replace(parameters=[*own, *added])
    return command


def _parameter(form: Format) -> str:
    return form.option.removeprefix("--").replace("-", "_")
