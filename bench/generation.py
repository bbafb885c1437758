"""The cost of a generated token's route, beside transformers' own decode step.

    python bench/generation.py --context 2048 --tokens 24

A plain decode step (sdpa, DynamicCache, inference mode) and a step of `Tracer.generate` of the same
token are run in turn; the first two of each are not counted, and figures are medians. Scored in a
step are the rows of the new token, one a layer, and rows of the prompt that no step reached before:
a step that needs none of these is counted apart.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import DynamicCache

from ifr_fast import Tracer
from ifr_fast.benchmark import first_tokens, prose
from ifr_fast.generation import generation

WARM_UP = 2


def main() -> None:
    """Prints one line a figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hub name or directory; default SmolLM2")
    parser.add_argument("--context", type=int, default=2048, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=24, help="tokens to generate")
    parser.add_argument("--threshold", type=float, default=0.04)
    options = parser.parse_args()

    tracer = Tracer.from_pretrained(options.model)
    prompt = first_tokens(prose(), tracer.tokenizer, options.context)
    scored, score_layer = 0, generation.score_layer

    def counting(recording, layer, rows, *rest):
        nonlocal scored
        scored += len(rows)
        return score_layer(recording, layer, rows, *rest)

    generation.score_layer = counting
    cache = DynamicCache(config=tracer.model.config)
    with torch.inference_mode():
        tracer.model(prompt[None], past_key_values=cache, logits_to_keep=1)
    steps = tracer.generate(
        tracer.record(prompt),
        max_new_tokens=options.tokens + 1,
        threshold=options.threshold,
        eos_token_id=[],
    )
    token_id = next(steps).token_id  # needs no decode step
    rows, plain, routed = [], [], []
    first, scored = scored, 0
    for _ in range(options.tokens):
        began = time.perf_counter()
        with torch.inference_mode():
            tracer.model(torch.tensor([[token_id]]), past_key_values=cache)
        plain.append(time.perf_counter() - began)
        began = time.perf_counter()
        token_id = next(steps).token_id
        routed.append(time.perf_counter() - began)
        rows.append(scored)
        scored = 0
    alone = [t for t, n in zip(routed[WARM_UP:], rows[WARM_UP:], strict=True) if n == 0]
    decode, with_route, new = (
        1e3 * statistics.median(x) for x in (plain[WARM_UP:], routed[WARM_UP:], alone)
    )
    print(f"{options.context} tokens of context, {torch.get_num_threads()} threads, {tracer.impl}")
    print(f"rows of the prompt scored for the first route: {first}")
    print(f"in each step after it: {', '.join(map(str, rows))}")
    print(f"transformers' decode step: {decode:.1f} ms")
    print(f"a step with its route: {with_route:.1f} ms, {with_route / decode - 1:+.1%}")
    print(f"{len(alone)} of these score none of the prompt: {new:.1f} ms, {new / decode - 1:+.1%}")


if __name__ == "__main__":
    main()
