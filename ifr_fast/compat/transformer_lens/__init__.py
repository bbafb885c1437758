"""TransformerLens on this engine: from a model and its activation cache to scores and graphs.

    logits, cache = model.run_with_cache(tokens)
    run = CachedRun(model, tokens, cache, logits)
    graph = run.trace(position=-1, threshold=0.04)

For a TransformerBridge (TransformerLens 3 and later) or a HookedTransformer (before 4), whatever
was done to its weights: folded norms, centred weights, moved value biases. Of each layer, the cache
gives `hook_resid_pre`, `attn.hook_pattern`, `attn.hook_v`, `hook_resid_mid` (in parallel blocks
`hook_mlp_out`) and `hook_resid_post`, the model `attn.W_O` and `attn.b_O`. Where a norm or a number
is between W_O and the residual stream, what the cache has of `ln1_post.hook_scale`, `hook_attn_out`
and `attn.hook_out` tells it.

1. A head's parts are pattern * (v @ W_O). The pattern is taken as it is and not computed of q and
   k, so what a hook made of it is what is explained (../given.py).
2. The node is `hook_resid_mid`; in a parallel block, where the MLP's output is one of its parts,
   and in one without an MLP it is `hook_resid_post`. resid_pre, the parts and b_O must add up to
   it, or `UnsupportedArchitectureError` is raised.
3. Scores and graphs are then those that `Tracer` makes of a text, with the same checks.
"""

from .run import Cache, CachedRun

__all__ = ["Cache", "CachedRun"]
