"""A RouteGraph as a standalone page that draws it, and as a notebook cell that holds the page.

The page is graph.html with graph.css, the scripts and the graph's JSON inserted. It makes no
network request, and its Content-Security-Policy forbids them. Tokens are data: they are inserted as
JSON in which no character can end the script element, and are displayed only through `textContent`.
"""

from __future__ import annotations

import re
from html import escape
from importlib import resources
from importlib.resources.abc import Traversable
from typing import TYPE_CHECKING

from ..characters import joined
from .json import to_json
from .labels import visible

if TYPE_CHECKING:
    from ..graph.data import GraphData

_SCRIPTS = ("graph", "drawing", "pointing")  # in the order of their definitions


def to_html(graph: GraphData) -> str:
    """The page as text, to write to a .html file."""
    here = resources.files(__package__)
    of_each = [graph.predictions] if graph.span is None else graph.span.predictions
    predicted = visible(joined([of[0].token if of else "?" for of in of_each]))
    fields = {
        "title": escape(f"{predicted} – information flow routes"),
        "style": here.joinpath("graph.css").read_text("utf-8"),
        "script": _script(here),
        "data": re.sub("[<>&]", lambda m: f"\\u{ord(m[0]):04x}", to_json(graph)),
    }
    page = here.joinpath("graph.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda m: fields[m[1]], page)


def _script(here: Traversable) -> str:
    """The script files in one function, so that no name is global."""
    parts = [here.joinpath(f"{name}.js").read_text("utf-8") for name in _SCRIPTS]
    return "\n".join(['"use strict";', "(() => {", *parts, "})();"])


def to_notebook_html(graph: GraphData) -> str:
    """The page in a sandboxed frame that may run only its own script."""
    height = min(860, max(420, 280 + 20 * graph.n_layers))  # CSS pixels; the page scrolls beyond
    return (
        f'<iframe srcdoc="{escape(to_html(graph))}" sandbox="allow-scripts" '
        f'title="Information flow routes" width="100%" height="{height}" '
        'style="border: 0"></iframe>'
    )
