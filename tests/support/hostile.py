"""A tiny model whose tokens are hostile to every format that a graph is exported to."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

import ifr_fast
from ifr_fast.graph.tables import Granularity
from ifr_fast.routes.route_graph import RouteGraph

N_TOKENS = 14
VOCABULARY = 97
HOSTILE = [
    "<script>window.__pwned = 1</script>",
    "</script><script>window.__pwned = 2</script>",
    "<!--",
    "<img src=x onerror='window.__pwned = 3'>",
    '"><b onmouseover=window.__pwned=4>',
    "{{data}}${x}",
    "line\nfeed\ttab\r",
    "\u2028\u2029",
    "\ud800",
    "\ufffd",
    "\u202eעברית مرحبا",
    " $x^2$ \\frac{$",
    "",
    "\u200b\u0301\x00日本語🎉",
]
assert len(HOSTILE) == N_TOKENS


@functools.cache
def tracer(parallel: bool, n_layers: int) -> ifr_fast.Tracer:
    torch.manual_seed(3)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    }
    if parallel:
        model: Any = GPTNeoXForCausalLM(GPTNeoXConfig(**shape, use_parallel_residual=True))
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 3
    return ifr_fast.Tracer(model.eval(), None)


@functools.cache
def trace(
    parallel: bool,
    granularity: Granularity = "token",
    *,
    n_layers: int = 4,
    n_tokens: int = N_TOKENS,
    threshold: float = 0.01,
) -> RouteGraph:
    ids = torch.randint(VOCABULARY, (n_tokens,), generator=torch.Generator().manual_seed(5))
    return tracer(parallel, n_layers).trace(ids, threshold=threshold, granularity=granularity)
