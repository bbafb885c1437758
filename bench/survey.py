"""The cost of a survey: tokens a second from file to Parquet, beside the plain forward pass.

    python bench/survey.py [--documents 8] [--tokens 512] [--repeat 5] [--model M] [--json F]

A round runs, in turn: the model's own forward pass over every document (sdpa, inference mode, no
cache) with the logits of one position, the same with all logits, which is what next-token
probabilities take, and `survey()` from a JSONL file to a complete directory, at the default
thresholds, everything recorded. Medians over the rounds; a first one warms up.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from ifr_fast import Tracer
from ifr_fast.benchmark import first_tokens, in_turn, machine, plain_forward, prose, subject
from ifr_fast.model.modes import evaluating
from ifr_fast.survey import survey


def main() -> None:
    """Measures and prints."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--documents", type=int, default=8)
    options.add_argument("--tokens", type=int, default=512)
    options.add_argument("--repeat", type=int, default=5)
    options.add_argument("--model", default=None)
    options.add_argument("--json", type=Path, default=None)
    given = options.parse_args()
    tracer = Tracer.from_pretrained(given.model)
    ids = first_tokens(prose(), tracer.tokenizer, given.documents * given.tokens)
    documents = list(ids.split(given.tokens))
    n = len(ids)

    def forward() -> None:
        for document in documents:
            plain_forward(tracer.model, document)()

    @torch.inference_mode()
    def all_logits() -> None:
        with evaluating(tracer.model):
            for document in documents:
                tracer.model(input_ids=document[None].to(tracer.decoder.device), use_cache=False)

    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder, "records.jsonl")
        lines = [json.dumps({"token_ids": document.tolist()}) for document in documents]
        records.write_text("\n".join(lines) + "\n")
        runs = 0

        def surveyed() -> None:
            nonlocal runs
            runs += 1
            found = survey(records, Path(folder, f"out-{runs}"), model=tracer)
            assert len(found.predictions) == n - len(documents)

        jobs = {"forward": forward, "all logits": all_logits, "survey": surveyed}
        seconds = in_turn(jobs, given.repeat)
    where, what = machine(tracer.decoder.device), subject(tracer)
    print(f"{what.model} in {what.dtype}, impl {what.impl}, attention {what.attention}")
    print(f"{where.processor}, {where.threads} threads; torch {where.torch}, ", end="")
    print(f"transformers {where.transformers}, ifr-fast {where.ifr_fast}")
    print(f"{len(documents)} documents of {given.tokens} tokens, medians of {given.repeat} rounds")
    for name, took in seconds.items():
        print(
            f"  {name:<11} {took:7.3f} s  {n / took:7.1f} tokens/s  "
            f"{seconds['forward'] / took:5.3f} of the forward pass's"
        )
    if given.json is not None:
        result = {
            "machine": where._asdict(),
            "subject": what._asdict(),
            "documents": len(documents),
            "tokens": given.tokens,
            "seconds": seconds,
        }
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
