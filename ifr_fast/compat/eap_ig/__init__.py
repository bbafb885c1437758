"""EAP-IG's information flow routes: scores between components, without positions.

This is the interface of https://github.com/hannamw/EAP-IG (its method `information-flow-routes`).
The MIB benchmark reads its JSON too. The nodes are `input`, the heads `a{layer}.h{head}`, the FFN
blocks `m{layer}` and `logits`. An edge leads from each node to every later one; a head has three
inputs:

    input->a0.h0<q>    a0.h1->m0    m0->a1.h0<v>    m1->logits

Unlike in a RouteGraph, the residual stream is not a node. The stream y that a node reads is the sum
of the outputs p_1 ... p_n of all nodes before it, and an edge's score is the importance

    proximity(p, y) = max(|y|_1 - |y - p|_1, 0),    importance = proximity / sum of proximities

at each position, averaged over a text's positions and then over texts. The stream y is:

- for a head, `resid_pre` of its layer, before the norm. So all heads of a layer, and their q, k and
  v, have equal scores for the same source. What a head does with the stream does not count, and
  neither do the positions it reads (a head's part is its output, wherever that was moved from);
- for an FFN block, `resid_mid` before the norm, or `resid_pre` in a parallel block;
- for `logits`, the last layer's `resid_post`, before the final norm.

The output of a head is its sum through its effective W_O, after a norm behind attention if there is
one. The output of an FFN block is what it adds to the stream. Biases of attention's output
projection belong to no node. `input` is the token's embedding alone, as in EAP-IG: learned
positions belong to no node, unless `positions=True` adds them to `input`.

Differences from EAP-IG:

- It reads a TransformerLens model. The usual loading centers weights and folds value biases and
  norms, which changes the stream and therefore the scores. Load it with
  `from_pretrained_no_processing` to compare.
- Its heads write before a norm that follows attention.
- If all proximities are 0, it has NaN; here each of n parts gets 1/n.
- It holds all nodes' outputs at all positions, [T, n, D]; here they are computed for some positions
  at a time.
"""

from .graph import Edge, Graph, Node
from .scores import METHOD, attribute, score_components

__all__ = ["METHOD", "Edge", "Graph", "Node", "attribute", "score_components"]
