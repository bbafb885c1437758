"""The result of a trace: scores of the prompt's tokens, as JSON and as a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    import os


@dataclass(frozen=True)
class TokenScore:
    """A prompt token and its score."""

    index: int
    token: str
    score: float


@dataclass(frozen=True)
class TraceResult:
    """The result of `FlashTrace.trace`: scores of the prompt's tokens, at least 0."""

    prompt_tokens: list[str]
    generation_tokens: list[str]
    scores: list[float]
    per_hop_scores: list[list[float]] = field(default_factory=list)
    thinking_ratios: list[float] = field(default_factory=list)
    output_span: tuple[int, int] | None = None
    reasoning_span: tuple[int, int] | None = None
    method: str = "flashtrace"
    metadata: dict[str, Any] = field(default_factory=dict)

    def topk_inputs(self, k: int = 20) -> list[TokenScore]:
        """The `k` prompt tokens with the highest scores; equal scores keep the text's order."""
        scored = enumerate(zip(self.prompt_tokens, self.scores, strict=False))
        items = [TokenScore(i, token, float(score)) for i, (token, score) in scored]
        return sorted(items, key=lambda item: item.score, reverse=True)[: max(0, int(k))]

    def to_dict(self) -> dict[str, Any]:
        """The result in types that JSON can hold, with the first 20 of `topk_inputs`."""
        return {
            "method": self.method,
            "prompt_tokens": list(self.prompt_tokens),
            "generation_tokens": list(self.generation_tokens),
            "scores": [float(x) for x in self.scores],
            "per_hop_scores": [[float(x) for x in row] for row in self.per_hop_scores],
            "thinking_ratios": [float(x) for x in self.thinking_ratios],
            "output_span": None if self.output_span is None else list(self.output_span),
            "reasoning_span": None if self.reasoning_span is None else list(self.reasoning_span),
            "top_inputs": [asdict(item) for item in self.topk_inputs()],
            "metadata": _jsonable(self.metadata),
        }

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_dict` to a file."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
        Path(path).write_text(text, encoding="utf-8")

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes a standalone page to a file, with the prompt's tokens shaded by their scores."""
        Path(path).write_text(_page(self), encoding="utf-8")


def _jsonable(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Tensor):
        return value.tolist()
    if is_dataclass(value) and not isinstance(value, type):
        return {name: _jsonable(x) for name, x in vars(value).items()}
    if isinstance(value, dict):
        return {str(key): _jsonable(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(x) for x in value]
    return repr(value)


_SPANS = ("sink_span", "thinking_span", "all_gen_span")  # metadata that are pairs of ints
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; }
.tokens { font-family: ui-monospace, monospace; line-height: 2; }
.tokens span { border-radius: 3px; padding: 2px 1px; white-space: pre-wrap; }
td, th { padding: 2px 12px 2px 0; text-align: left; }
td:first-child, td:last-child { font-variant-numeric: tabular-nums; }
"""


def _page(result: TraceResult) -> str:
    facts = {
        "method": result.method,
        "output_span": result.output_span,
        "reasoning_span": result.reasoning_span,
    }
    sections = [("Prompt", _tokens(result.prompt_tokens, result.scores))]
    sections += [
        (f"Hop {i}", _tokens(result.prompt_tokens, scores))
        for i, scores in enumerate(result.per_hop_scores)
    ]
    rows = "".join(
        f"<tr><td>{item.index}</td><td><code>{escape(item.token)}</code></td>"
        f"<td>{item.score:.6f}</td></tr>"
        for item in result.topk_inputs()
    )
    head = "<tr><th>index</th><th>token</th><th>score</th></tr>"
    sections.append(("Top tokens", f"<table>{head}{rows}</table>"))
    scalars = {
        name: x
        for name, x in dict(result.metadata.get("ifr", {})).items()
        if isinstance(x, str | int | float | None) or name.startswith(_SPANS)
    }
    sections.append(("Metadata", f"<pre>{escape(json.dumps(scalars, indent=1))}</pre>"))
    body = "".join(f"<section><h2>{title}</h2>{of}</section>" for title, of in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>Prompt tokens by score</title><style>{_STYLE}</style></head>"
        f"<body><h1>Prompt tokens by score</h1><p>{escape(json.dumps(facts))}</p>{body}</body>"
        "</html>\n"
    )


def _tokens(tokens: Sequence[str], scores: Sequence[float]) -> str:
    highest = max((abs(x) for x in scores), default=0.0) or 1.0
    spans = (
        f'<span title="{i}: {score:.6f}" '
        f'style="background: rgba(255, 120, 0, {0.75 * abs(score) / highest:.3f})">'
        f"{escape(token)}</span>"
        for i, (token, score) in enumerate(zip(tokens, scores, strict=False))
    )
    return f'<div class="tokens">{"".join(spans)}</div>'
