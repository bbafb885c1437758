"""What becomes of every causal language model that the installed transformers knows: it opens, and
agrees with the definition, or it is refused, or it cannot be built. docs/models.md has the table.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
import transformers
from definition import NoAccountError, importances_by_definition
from every_model import VOCAB, every_model
from oracle import TOLERANCE, LayerImportance
from tiny import MODELS_PAGE

from ifr_fast import IfrError, Recording, Tracer
from ifr_fast.scoring.implementations import load_kernel
from ifr_fast.scoring.scores import LayerScores

N_TOKENS = 17  # a prime that no dimension shares; beyond every window
BEGIN, END = "<!-- made by `python tests/sweep.py --write` -->\n", "<!-- end of the sweep -->\n"
OPENS, REFUSED, UNBUILT = "opens", "refused", "cannot be built"
BREAKS, WRONG = "breaks", "wrong"


class Outcome(NamedTuple):
    kind: str
    why: str = ""
    error: float = 0.0  # the largest difference of an importance, where the model opens

    def row(self) -> str:
        """The outcome in the table."""
        said = f"{self.why or f'{self.error:.0e}'}"
        return f"{self.kind}{', ' if self.kind == OPENS else ': '}{said}"


def outcome(name: str, implementations: tuple[str, ...]) -> Outcome:
    """What becomes of the class `name`."""
    try:
        model = every_model(name)
    except Exception as error:  # whatever a class raises that is not made for its configuration
        return Outcome(UNBUILT, _line(error))
    text = torch.randint(VOCAB, (N_TOKENS,), generator=torch.Generator().manual_seed(1))
    try:
        tracer = Tracer(model, impl="eager")
        text = tracer.decoder.without_padding(text)  # RoBERTa's has no position
        recordings = [tracer.record(text, mode=mode) for mode in ("full", "lean")]
    except IfrError as error:
        return Outcome(REFUSED, _line(error))
    except Exception as error:
        return Outcome(BREAKS, f"{type(error).__name__}: {_line(error)}")
    try:
        expected = importances_by_definition(model, text)
    except NoAccountError as error:
        return Outcome(WRONG, f"it opens, but {_line(error)}")
    return _compared(tracer, recordings, expected, implementations)


def _compared(
    tracer: Tracer,
    recordings: list[Recording],
    expected: list[LayerImportance],
    implementations: tuple[str, ...],
) -> Outcome:
    """Scores by each implementation, with q and `resid_mid` recorded and replayed."""
    largest = 0.0
    for impl in implementations:
        tracer.impl, tracer.kernel = impl, load_kernel(impl)
        # Triton's interpreter takes seconds a layer.
        layers = [len(expected) - 1] if impl == "triton" else list(range(len(expected)))
        for recording in recordings:
            seen = 0
            for scores in tracer.contributions(recording, layers=layers, keep=0.0):
                largest = max(largest, _difference(scores, expected[scores.layer]))
                seen += 1
            assert seen == len(layers)
    wrong = not largest < TOLERANCE
    return Outcome(WRONG if wrong else OPENS, f"by {largest:.1e}" if wrong else "", largest)


def _difference(scores: LayerScores, expected: LayerImportance) -> float:
    """The largest difference of an importance of a layer."""
    heads = torch.zeros_like(expected.heads)
    edges = scores.head_edges
    heads[edges.head.long(), edges.target.long(), edges.source.long()] = edges.weight.double()
    pairs = [
        (scores.residual, expected.residual),
        (scores.ffn, expected.ffn),
        (heads, expected.heads),
    ]
    if expected.ffn_residual is not None:
        pairs.append((scores.ffn_residual, expected.ffn_residual))
    return max(float((mine.double() - theirs).abs().max()) for mine, theirs in pairs)


def _line(error: Exception) -> str:
    """The first line of an error, without numbers that differ between machines."""
    said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return re.sub(r" \(relative error [^)]*\)", "", said.strip()).removeprefix("model: ")


def page_with(outcomes: dict[str, Outcome]) -> str:
    """docs/models.md with a table of these outcomes."""
    before, rest = MODELS_PAGE.read_text().split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}{_section(outcomes)}{END}{after}"


def _section(outcomes: dict[str, Outcome]) -> str:
    kinds = [of.kind for of in outcomes.values()]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(sorted(kinds)))
    order = sorted(outcomes, key=lambda name: (outcomes[name].kind, name.lower()))
    rows = "".join(f"| {name} | {outcomes[name].row()} |\n" for name in order)
    return (
        f"transformers {transformers.__version__}, {len(outcomes)} classes: {counts}.\n\n"
        f"| class | outcome |\n| --- | --- |\n{rows}"
    )


def listed() -> tuple[str, dict[str, str]]:
    """The version of transformers that the page's table is of, and the rows, by class."""
    section = MODELS_PAGE.read_text().split(BEGIN)[1].split(END)[0]
    version = re.match(r"transformers (\S+),", section)
    assert version
    return version[1], dict(re.findall(r"^\| (\w+) \| (.*) \|$", section, re.MULTILINE)[1:])
