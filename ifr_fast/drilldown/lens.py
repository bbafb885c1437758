"""A node or a part in tokens: the logit lens, and the tokens that a part promotes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..arguments import as_index, index_within
from ..characters import next_tokens
from ..graph.tables import Node, NodeKind, Prediction, plain_tensor
from ..model.decoder import Decoder
from ..model.readout import direct_logits, lens_logits
from ..recording.layer_inputs import layer_inputs
from ..recording.recording import Recording
from .neuron_basis import NeuronBases
from .neurons import neuron_output
from .parts import carried, ffn_output, head_output


class TokenScore(NamedTuple):
    """A token, and the number that is added to its logit."""

    token: str
    token_id: int
    logit: float


@dataclass(frozen=True, eq=False)
class NodeLens:
    """The predictions of a node, decoded as if it were the final state (logit lens)."""

    node: Node
    logits: Tensor  # [vocab] float32
    predictions: list[Prediction]  # most probable first

    def rank(self, token_id: int) -> int:
        """The token's place: 1 is the most probable; tokens that tie share the better place."""
        return int((self.logits > self.logits[self._known(token_id)]).sum()) + 1

    def probability(self, token_id: int) -> float:
        """The token's probability, by the softmax of the logits."""
        return float(self.logits.double().softmax(-1)[self._known(token_id)])

    def _known(self, token_id: int) -> int:
        if not 0 <= as_index("token_id", token_id) < len(self.logits):
            raise ValueError(f"token_id: expected 0 to {len(self.logits) - 1}, got {token_id}")
        return token_id


@dataclass(frozen=True, eq=False)
class PromotedTokens:
    """The logits that one part of a residual stream adds at its position."""

    part: Tensor  # [D] float32
    logits: Tensor  # [vocab] float32, a summand of the logits of all parts
    promoted: list[TokenScore]  # largest first
    suppressed: list[TokenScore]  # most negative first


class PartChoice(NamedTuple):
    """One part of a layer's output: its FFN block, one neuron of it, a head, or a head's source."""

    layer: int
    head: int | None
    source: SupportsIndex | None
    neuron: int | None

    @staticmethod
    def of(
        decoder: Decoder,
        layer: int,
        head: int | None,
        source: SupportsIndex | None,
        neuron: int | None,
    ) -> PartChoice:
        """The choice that these arguments make. Raises ValueError where they name no part."""
        if neuron is not None and head is not None:
            raise ValueError("neuron: give it, or head, not both")
        if source is not None and head is None:
            raise ValueError("source: goes with head")
        layer = index_within("layer", layer, decoder.n_layers)
        if head is not None:
            head = index_within("head", head, decoder.heads_at(layer))
        return PartChoice(layer, head, source, neuron)

    def output(self, recording: Recording, position: int, bases: NeuronBases) -> Tensor:
        """[D] the output of the part at a position, in float32 or wider."""
        layer, head, source, neuron = self
        if source is not None:
            source = index_within("source", source, len(recording))
            if source > position:
                raise ValueError(f"source: expected a position up to {position}, got {source}")
        if head is not None:
            return head_output(recording, layer, head, position, source)
        if neuron is not None:
            return neuron_output(recording, layer, as_index("neuron", neuron), position, bases)
        return ffn_output(recording, layer, position)


def listed_nodes(nodes: Node | Iterable[Node]) -> tuple[list[Any], bool]:
    """The nodes given, and whether it was a single one. Raises ValueError where there are none."""
    if not isinstance(nodes, Iterable):
        raise ValueError(f"nodes: expected a node or several, got {nodes!r}")
    single = isinstance(nodes, tuple) and len(nodes) == 3 and isinstance(nodes[1], str)
    given: list[Any] = [nodes] if single else list(nodes)
    if not given:
        raise ValueError("nodes: is empty; expected at least one node")
    return given, single


def node_within(given: Any, n_layers: int, n_tokens: int) -> Node:
    """A node of a text, from (layer, kind, position); negative ones count from the end. Raises
    ValueError where there is no such node.
    """
    try:
        layer, kind, position = given
        kind = NodeKind(kind)
    except (TypeError, ValueError):
        raise ValueError(
            "nodes: expected (layer, kind, position) with a kind of "
            f"{', '.join(NodeKind)}, got {given!r}"
        ) from None
    layer = index_within("nodes: layer", layer, n_layers)
    if kind == NodeKind.EMBED and layer != 0:
        raise ValueError(f"nodes: an embed is at layer 0, got {layer}")
    return Node(layer, kind, index_within("nodes: position", position, n_tokens))


def lenses(
    recording: Recording, nodes: list[Node], k: int, tokenizer: PreTrainedTokenizerBase | None
) -> list[NodeLens]:
    """Each node, read by the model's own final norm and head."""
    states = torch.stack([_state(recording, node) for node in nodes])
    logits = lens_logits(recording.decoder, states.to(recording.decoder.device)).float().cpu()
    found = []
    for node, row in zip(nodes, plain_tensor(logits), strict=True):
        top = row.softmax(-1).topk(min(k, len(row)))
        strings = next_tokens(top.indices, recording.token_ids[: node.position + 1], tokenizer)
        columns = strings, top.indices.tolist(), top.values.tolist()
        found.append(NodeLens(node, row, [Prediction(*p) for p in zip(*columns, strict=True)]))
    return found


def promoted_tokens(
    recording: Recording,
    part: Tensor,
    chosen: PartChoice,
    position: int,
    k: int,
    tokenizer: PreTrainedTokenizerBase | None,
) -> PromotedTokens:
    """The logits that `part` [D], the output of the chosen one at a position, adds there."""
    decoder = recording.decoder
    by_head = chosen.head is not None
    left = carried(recording, part, chosen.layer, position, by_head=by_head)
    final = recording.resid_final[position].to(left.device)
    logits = plain_tensor(direct_logits(decoder, left[None], final[None])[0].float().cpu())

    def scores(top: Any) -> list[TokenScore]:
        strings = next_tokens(top.indices, recording.token_ids[: position + 1], tokenizer)
        columns = strings, top.indices.tolist(), top.values.tolist()
        return [TokenScore(*row) for row in zip(*columns, strict=True)]

    k = min(k, len(logits))
    return PromotedTokens(
        plain_tensor(part.float().cpu()),
        logits,
        scores(logits.topk(k)),
        scores(logits.topk(k, largest=False)),
    )


@torch.inference_mode()
def _state(recording: Recording, node: Node) -> Tensor:
    """[D] the representation of a node."""
    layer, kind, position = node
    match kind:
        case NodeKind.EMBED:
            return recording.layers[0].resid_pre[position]
        case NodeKind.POST:
            return recording.resid_post(layer)[position]
        case NodeKind.FFN:
            return ffn_output(recording, layer, position).to(recording.decoder.dtype)
        case NodeKind.MID:
            with recording.decoder.replaying():
                inputs, post, _ = layer_inputs(recording, layer, torch.tensor([position]))
            if post is None:
                raise ValueError(
                    f"nodes: layer {layer} is a parallel block, which has no {kind.value}"
                )
            return inputs.y[0]
