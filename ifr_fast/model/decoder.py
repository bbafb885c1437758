"""Decoder: a causal language model that was opened, and every way in which it is run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ..errors import UnsupportedArchitectureError
from .attention import AttentionCall
from .block import Block
from .fingerprint import fingerprint
from .hooks import LayerCall, hooked, in_this_thread, on_output
from .interface import AttentionThrough, attention_through, exclusively
from .modes import evaluating, overriding_layers


def _embeddings(model: PreTrainedModel) -> Tensor:
    """The table of input embeddings [vocab, D], within whatever wraps it; perhaps offloaded."""
    module = model.get_input_embeddings()
    tables = [x.weight for x in module.modules() if isinstance(x, nn.Embedding)]
    table = tables[0] if tables else getattr(module, "weight", None)
    if not isinstance(table, Tensor):
        raise UnsupportedArchitectureError(
            f"model: its input embeddings, {type(module).__name__}, have no table of tokens"
        )
    return table


class _Past(DynamicCache):  # type: ignore[misc]
    """A cache that says how many tokens came before, and holds none: models that take no positions,
    or count them from another number than 0, ask it.
    """

    def __init__(self, n_tokens: int) -> None:
        super().__init__()
        self._n_tokens = n_tokens

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """The number of tokens before."""
        return self._n_tokens

    def get_mask_sizes(self, query: Any, *_: Any, **__: Any) -> tuple[int, int]:
        """Masks are those of a token on its own."""
        return (query if isinstance(query, int) else len(query)), 0

    def update(self, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values, as they are."""
        return k, v


class Decoder:
    """A causal language model, opened for recording and replay by `opening.open_decoder`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        decoder = model.get_decoder()
        # It may have found none by name, or the head.
        if decoder is model or not isinstance(decoder, PreTrainedModel):
            decoder = next((x for x in model.children() if isinstance(x, PreTrainedModel)), model)
        self._states: nn.Module = decoder  # the module whose output the head reads
        takes = inspect.signature(model.forward).parameters
        self._keeps_logits = "logits_to_keep" in takes
        self._takes_positions = "position_ids" in takes
        self.vocab_size = len(_embeddings(model))
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        # XLNet states -1: it has no end.
        self.max_length = context if isinstance(context, int) and context > 0 else None
        # The padding token, where it moves the positions of tokens behind it; None: it does not.
        self.counted_padding: int | None = None
        self.takes_past = "past_key_values" in takes
        self.counts_past = False  # whether a step's position is given as the length of a cache
        self.steps_checked = False  # whether decode steps were found to equal a whole pass
        self.attention_through: AttentionThrough = attention_through
        self.makes_masks = False  # whether its attention gets masks that it made of the text
        self.blocks: list[Block] = []  # bottom first, once the model is opened
        self.final_site: nn.Module | None = None  # reads the last layer's output; None: the head
        self.checked_hooks: list[tuple[str, int]] = []  # `hook_keys` when the model was opened

    @property
    def n_layers(self) -> int:
        """Decoder layers."""
        return len(self.blocks)

    @property
    def n_heads(self) -> int:
        """Attention heads of the layer that has most."""
        return max(block.W_O.shape[0] for block in self.blocks)

    def heads_at(self, layer: int) -> int:
        """Attention heads of one layer."""
        return self.blocks[layer].W_O.shape[0]

    @property
    def has_recurrences(self) -> bool:
        """True if a layer computes linear attention, whose weights are no softmax."""
        return any(block.recurrence_size for block in self.blocks)

    def refuse_recurrences(self, why: str) -> None:
        """Raises UnsupportedArchitectureError if the model has linear attention."""
        if self.has_recurrences:
            name = type(self.model).__name__
            raise UnsupportedArchitectureError(f"model: {name} has linear attention, and {why}")

    @property
    def d_heads(self) -> list[int]:
        """Dimensions of a head's values, layer by layer."""
        return [block.W_O.shape[1] for block in self.blocks]

    @property
    def d_model(self) -> int:
        """Dimensions of the residual stream."""
        return self.blocks[0].W_O.shape[2]

    @property
    def value_layers(self) -> list[int] | None:
        """[L] the layer whose keys and values a layer reads; None: each reads its own."""
        read = [block.value_layer for block in self.blocks]
        if not any(of is not None for of in read):
            return None
        return [i if of is None else of for i, of in enumerate(read)]

    @property
    def device(self) -> torch.device:
        """The device that takes token ids and returns scores."""
        device = _embeddings(self.model).device
        if device.type != "meta":
            return device
        # Offloaded weights are loaded onto the device that uses them.
        return self.blocks[0].W_O.device if self.blocks else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the residual stream."""
        return self.blocks[0].bias.dtype

    def rotary_regime(self, n_tokens: int) -> list[int]:
        """The properties of a text's length that its rotary frequencies depend on. The keys of two
        texts that begin alike are the same only where these are equal for both lengths. A model
        that makes masks itself may choose keys at one length and not at another.
        """
        if self.makes_masks and self.attention_through is attention_through:
            return [n_tokens]
        config = self.model.config.get_text_config()
        parameters = getattr(config, "rope_parameters", None) or {}
        of_each = list(parameters.values())
        if not all(isinstance(of, dict) for of in of_each):
            of_each = [parameters]
        regime = []
        for of in of_each:
            kind = of.get("rope_type")
            original = of.get("original_max_position_embeddings") or self.max_length or n_tokens
            if kind == "longrope":  # one set of frequencies for short texts, another for long ones
                regime.append(int(n_tokens > original))
            elif kind == "dynamic":  # stretched to the text
                regime.append(max(n_tokens, original))
        return regime

    def fingerprint(self) -> str:
        """A digest of everything that the forward pass reads: see `fingerprint.fingerprint`."""
        with exclusively(self.model):
            return fingerprint(self.model)

    def without_padding(self, token_ids: Tensor) -> Tensor:
        """Token ids with another in place of `counted_padding`."""
        if self.counted_padding is None:
            return token_ids
        other = (self.counted_padding + 1) % self.vocab_size
        return token_ids.where(token_ids != self.counted_padding, other)

    def _check_padding(self, token_ids: Tensor) -> None:
        """Raises ValueError for a text in which padding would move other tokens' positions."""
        pad = self.counted_padding
        if pad is not None and bool((token_ids == pad).any()):
            raise ValueError(
                f"text: holds token {pad}, the padding of {type(self.model).__name__}, which does "
                "not count it among positions; expected a text without padding"
            )

    def forward(self, token_ids: Tensor, position: int = -1) -> tuple[Tensor, Tensor]:
        """Runs the model on `token_ids` [T].

        Returns the states that its head reads, [T, D], and the logits [vocab] at `position`.
        """
        states: list[Tensor] = []
        self._check_padding(token_ids)
        ids = token_ids.to(self.device)[None]
        position %= len(token_ids)
        kept = torch.tensor([position], device=ids.device)
        with hooked(on_output(self._states, states.append)):
            output = self.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                use_cache=False,
                **({"logits_to_keep": kept} if self._keeps_logits else {}),
            )
        if len(states) != 1 or states[0].shape[:2] != (1, len(token_ids)):
            raise UnsupportedArchitectureError(
                f"model: {type(self.model).__name__} has no decoder that its head reads from once"
            )
        return states[0][0], output.logits[0, 0 if self._keeps_logits else position]

    def forward_batch(self, token_ids: Tensor) -> Tensor:
        """Runs the model on `token_ids` [B, T]; returns the states that its head reads, [B, T, D].

        No row is masked: padding belongs behind the texts.
        """
        states: list[Tensor] = []
        self._check_padding(token_ids)
        ids = token_ids.to(self.device)
        # A number would let some models leave rows out of their last layers.
        last = torch.tensor([ids.shape[1] - 1], device=ids.device)
        with hooked(on_output(self._states, states.append)):
            self.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                use_cache=False,
                **({"logits_to_keep": last} if self._keeps_logits else {}),
            )
        return states[0]

    def step(self, token_id: int, position: int) -> tuple[Tensor, Tensor]:
        """Runs the model on one token of a text, at `position`. The caller overrides its attention
        by a handler that knows the keys and values of the tokens before.

        Returns as `forward` does: states [1, D] and logits [vocab].
        """
        states: list[Tensor] = []
        self._check_padding(torch.tensor(token_id))
        ids = torch.tensor([[token_id]], device=self.device)
        placed: dict[str, Any] = {}
        if self.counts_past:
            placed["past_key_values"] = _Past(position)
        elif self._takes_positions:
            placed["position_ids"] = torch.full_like(ids, position)
        with hooked(on_output(self._states, states.append)):
            output = self.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **placed
            )
        return states[0][0], output.logits[0, -1]

    def on_states(self, keep: Callable[[Tensor], None]) -> torch.utils.hooks.RemovableHandle:
        """Hands `keep` the states [B, T, D] that the head reads, of each run."""
        return on_output(self._states, keep)

    @torch.inference_mode()
    def head(self, states: Tensor) -> Tensor:
        """Logits [R, vocab] of any of the states that `forward` returned, [R, D].

        The head may be more than a matrix (soft-caps, scales), so the model itself applies it: in
        a run of one token whose final states are exchanged for the given ones.
        """

        def exchange(_: nn.Module, __: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (states[None], *output[1:])
            return type(output)(last_hidden_state=states[None])

        ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        with (
            evaluating(self.model),
            hooked(self._states.register_forward_hook(in_this_thread(exchange))),
        ):
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits[0]

    @contextmanager
    def overriding_layers(
        self, output_of: Callable[[Block, Tensor, LayerCall], Tensor]
    ) -> Iterator[None]:
        """Within, no layer runs: `output_of` gives its output (modes.overriding_layers)."""
        with exclusively(self.model), overriding_layers(self.blocks, output_of):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Within, single layers can be run again, their attention overridden by a replay."""

        def outside(_: AttentionCall) -> NoReturn:
            raise AssertionError("attention was called outside of a replay")

        with self.attention_through(self.model, outside), evaluating(self.model):
            yield
