"""Batches: several texts in one forward pass.

Texts are padded on the right, and nothing is masked: in a causal decoder a token does not depend on
later ones. Every text's rows are thus the same as when it runs alone, whatever positions, windows
and biases the model has. Texts that come with padding, on either side, are cut to their own tokens
first.

Texts of similar length run together, if they share a rotary regime (where frequencies depend on
the length of the text, the longest would decide for all). Models outside of transformers' attention
interface merge heads with the batch, each in its own way: their texts run one by one.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..model.decoder import Decoder
from ..model.interface import attention_through

_BATCH_TOKENS = 8192  # tokens of one pass, padding included, unless a batch size is given


def can_batch(decoder: Decoder) -> bool:
    """True if several texts can go through this model at once."""
    return decoder.attention_through is attention_through


def batches(
    decoder: Decoder,
    lengths: list[int],
    batch_size: int | None = None,
    batch_tokens: int = _BATCH_TOKENS,
) -> Iterator[list[int]]:
    """Groups texts of these lengths to run together: indices, longest first, each once.

    batch_size: texts of a pass; None: as many as fit into `batch_tokens`, padding included.
    """
    if not can_batch(decoder):
        batch_size = 1
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    found: list[int] = []
    for i in order:
        longest = lengths[found[0]] if found else lengths[i]
        limit = batch_size or max(1, batch_tokens // longest)
        alike = decoder.rotary_regime(longest) == decoder.rotary_regime(lengths[i])
        if found and (len(found) >= limit or not alike):
            yield found
            found = []
        found.append(i)
    if found:
        yield found
