"""EAP-IG's information flow routes: scores between components, without positions.

A face of https://github.com/hannamw/EAP-IG (its method `information-flow-routes`), whose JSON the
MIB benchmark reads too. The nodes are `input`, the heads `a{layer}.h{head}`, the FFN blocks
`m{layer}` and `logits`; an edge leads from each node to every later one, into a head by its three
inputs:

    input->a0.h0<q>    a0.h1->m0    m0->a1.h0<v>    m1->logits

Unlike in a RouteGraph, the residual stream is no node. The stream y that a node reads is taken as a
sum of the outputs p_1 ... p_n of all nodes before it, and an edge's score is the importance

    proximity(p, y) = max(|y|_1 - |y - p|_1, 0),    importance = proximity / sum of proximities

at each position, averaged over a text's positions and then over texts. What is read:

- a head: `resid_pre` of its layer, before the norm. So the scores of one source are equal for all
  heads of a layer and for q, k and v: what they do with the stream does not enter, and neither does
  where a head reads (a head's output at its own position is its part, whatever it was moved from);
- an FFN block: `resid_mid` before the norm; in a parallel block `resid_pre`;
- `logits`: the last layer's `resid_post`, before the final norm.

What is written: a head writes its summed output through its effective W_O, so behind a norm after
attention where there is one; an FFN block what it adds to the stream. Biases of attention's output
projection are nobody's. `input` is the token's embedding alone, as there: learned positions are
part of no node, unless `positions=True` gives them to it.

Where this differs from EAP-IG: it reads a TransformerLens model, whose usual loading centers
weights and folds value biases and norms, which changes the stream and so the scores (load it with
`from_pretrained_no_processing` to compare); its heads write before a norm after attention; where
all proximities are 0 it has NaN, here each of n parts gets 1/n. It holds all nodes' outputs at all
positions, [T, n, D]; here that is done some positions at a time.
"""

from .graph import Edge, Graph, Node
from .scores import METHOD, attribute, score_components

__all__ = ["METHOD", "Edge", "Graph", "Node", "attribute", "score_components"]
