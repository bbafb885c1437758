"""TransformerLens on this engine: scores and graphs from a model and its activation cache.

    logits, cache = model.run_with_cache(tokens)
    run = CachedRun(model, tokens, cache, logits)
    graph = run.trace(position=-1, threshold=0.04)

The model is a TransformerBridge (TransformerLens 3 and later) or a HookedTransformer (before 4).
Its weights may be processed: folded norms, centred weights, moved value biases. In each layer these
entries of the cache are read: `hook_resid_pre`, `attn.hook_pattern`, `attn.hook_v`,
`hook_resid_mid` (in parallel blocks `hook_mlp_out`) and `hook_resid_post`. The model gives
`attn.W_O` and `attn.b_O`. A norm or a factor between W_O and the residual stream is found from
`ln1_post.hook_scale`, `hook_attn_out` and `attn.hook_out`, if the cache has them.

1. A head's parts are pattern * (v @ W_O). The pattern is read from the cache and not computed from
   q and k. If a hook changed it, the changed pattern is explained.
2. The node is `hook_resid_mid`. In a parallel block, where the MLP's output is one of the node's
   parts, and in a block without an MLP, it is `hook_resid_post`. resid_pre, the parts and b_O must
   add up to the node, or `UnsupportedArchitectureError` is raised.
3. Scores and graphs are then computed as by `Tracer`, with the same checks.
"""

from .run import Cache, CachedRun

__all__ = ["Cache", "CachedRun"]
