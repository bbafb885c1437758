"""A RouteGraph as a standalone page that draws it, and as a notebook cell that holds the page.

The page is graph.html with explorer.js and the graph's packed JSON inserted. explorer.js is built
from ifr_fast/explorer/web. The page makes no network request, and its Content-Security-Policy
allows no script but this one, by its hash. Tokens are data: they are inserted as JSON in which no
character can end the script element, and are displayed only as text nodes.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from html import escape
from importlib import resources
from typing import TYPE_CHECKING

from ..characters import joined
from .labels import visible
from .packed import to_packed_json

if TYPE_CHECKING:
    from ..graph.data import GraphData

_STYLE = "html,body{height:100%;margin:0}#explorer{height:100%}"


def to_html(graph: GraphData) -> str:
    """The page as text, to write to a .html file."""
    of_each = [graph.predictions] if graph.span is None else graph.span.predictions
    predicted = visible(joined([of[0].token if of else "?" for of in of_each]))
    script = explorer_script()
    fields = {
        "title": escape(f"{predicted} – information flow routes"),
        "style": _STYLE,
        "style_hash": _hash(_STYLE),
        "script": script,
        "hash": _hash(script),
        "data": re.sub("[<>&]", lambda m: f"\\u{ord(m[0]):04x}", to_packed_json(graph)),
    }
    page = resources.files(__package__).joinpath("graph.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda m: fields[m[1]], page)


@cache
def explorer_script() -> str:
    """The script that draws graphs, for a page, a server and a notebook's widget alike.

    It defines one global, `ifrExplorer`, and fills an element with `data-ifr-host`.
    """
    return resources.files(__package__).joinpath("explorer.js").read_text("utf-8")


def _hash(text: str) -> str:
    """The source expression by which a Content-Security-Policy allows an inline element."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def to_notebook_html(graph: GraphData) -> str:
    """The page in a sandboxed frame that may run only its own script and offer downloads."""
    height = min(860, max(480, 300 + 20 * graph.n_layers))  # CSS pixels; the page scrolls beyond
    return (
        f'<iframe srcdoc="{escape(to_html(graph))}" sandbox="allow-scripts allow-downloads" '
        'allow="fullscreen; clipboard-write" '
        f'title="Information flow routes" width="100%" height="{height}" '
        'style="border: 0"></iframe>'
    )
