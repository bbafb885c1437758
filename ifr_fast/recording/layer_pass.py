"""One forward pass that is watched: what scoring, recording and restarting a model read off it.

B texts run together, padded behind their last token to T rows. In each layer, in this order:

1. The layer is entered: its residual stream `resid_pre` and its other arguments are noted.
2. Its attention module asks for its output z. Torch's own kernel computes it, with the scores'
   log-sum-exp where that is wanted and costs nothing.
3. `resid_mid` is noted: at all rows, or at a few.
4. The layer is left: `resid_post` is noted.

After steps 2 and 4 the caller is handed the layer. It keeps what it needs: the pass itself forgets
a layer when it is left. At the end `WatchedPass.finite` tests the masks and the states, with one
device synchronization.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from ..errors import IfrError, UnsupportedArchitectureError
from ..kernels.rows import on_device
from ..model.attention import AttentionCall, attend, attend_and_sum
from ..model.block import Block
from ..model.decoder import Decoder
from ..model.hooks import LayerCall, map_tensors, on_input, on_layer_call, on_output
from ..model.masks import LazyMask
from ..model.modes import evaluating
from ..model.opening import check_hooks
from ..model.stream import Chain, SharedValues, check_n_keys, on_end
from ..model.unmixed import no_attention
from .hook_checks import LayerRun, check_entered, hooked_layers, hooked_outside


def pad(texts: Sequence[Tensor]) -> Tensor:
    """Token ids [B, T] of B texts, each filled up with its last token."""
    T = max(len(x) for x in texts)
    return torch.stack([torch.cat([x, x[-1:].expand(T - len(x))]) for x in texts])


def kept_rows(n_tokens: int, position: int) -> Tensor:
    """The rows whose `resid_mid` a lean recording holds, to be checked."""
    return torch.tensor(sorted({position % n_tokens, n_tokens // 2, n_tokens - 1}))


def window_of(block: Block, mask: LazyMask, n_tokens: int) -> int | None:
    """The keys that a row sees, where a text of `n_tokens` has more."""
    # A mask that is a tensor shows its window only to texts that cross it.
    return block.crossed_window(n_tokens) if mask.n_rows is None else mask.window(n_tokens)


def not_finite(layer: int, dtype: torch.dtype) -> IfrError:
    """The error for states [T, D] that `layer` returned."""
    return IfrError(
        f"text: the model's states are not finite after layer {layer} in {dtype}; "
        "try a wider torch_dtype"
    )


class Masks:
    """The masks of a pass over `n_tokens` rows, to be compared with those of the opening probe."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        # Layers share few masks. A mask is held, since a later one might get its id.
        self._seen: dict[int, tuple[LazyMask, int | None]] = {}

    def see(self, mask: LazyMask, window: int | None) -> bool:
        """Takes note of a layer's mask; returns whether it is a new one."""
        is_new = id(mask) not in self._seen
        self._seen.setdefault(id(mask), (mask, window))
        return is_new

    def flags(self) -> list[Tensor]:
        """One 0-d bool for each mask: whether rows see all past keys, or those of one window."""
        return [mask.is_causal(self.n_tokens, window) for mask, window in self._seen.values()]

    def check(self, flags: Sequence[bool]) -> None:
        """Raises UnsupportedArchitectureError unless all of `flags`, as read, are true."""
        if not all(flags):
            raise UnsupportedArchitectureError(
                f"model: at {self.n_tokens} tokens its attention reads other keys than on the "
                "probe it was opened with: neither all past ones, nor those of one sliding window"
            )


class WatchedLayer:
    """One layer as the pass goes through it; tensors are the model's own."""

    # Set when attention is computed:
    attention: AttentionCall
    window: int | None  # the keys that each of T rows sees, where there are more
    z: Tensor  # [B, T, H, V]
    log_sum_exp: Tensor | None = None  # [B, T, H]
    # Set when the layer is left:
    resid_mid: Tensor  # [B, T, D], or [C, D] of a few rows; in parallel blocks without the FFN
    resid_post: Tensor  # [B, T, D]

    def __init__(self, block: Block, resid_pre: Tensor, layer_call: LayerCall) -> None:
        self.block = block
        self.resid_pre = resid_pre  # [B, T, D]
        self.layer_call = layer_call

    def window_of(self, n_tokens: int) -> int | None:
        """The keys that a row of one of the texts sees, where the text has more."""
        if n_tokens == self.resid_pre.shape[1]:
            return self.window
        return window_of(self.block, self.attention.mask, n_tokens)

    def call_of(self, b: int) -> LayerCall:
        """The layer's other arguments for text `b`."""
        return of_texts(self.layer_call, slice(b, b + 1), len(self.resid_pre))


class WatchedPass:
    """One forward pass over texts of `lengths`, which the caller runs within `watching`.

    sums: whether log-sum-exps are wanted. mid_rows: the rows b * T + t at which `resid_mid` is
    noted; None: all. attended, left: called with the layer after its attention and at its end. What
    they run of the model is not watched.
    """

    def __init__(
        self,
        decoder: Decoder,
        lengths: Sequence[int],
        *,
        left: Callable[[WatchedLayer], None],
        attended: Callable[[WatchedLayer], None] | None = None,
        sums: bool = False,
        mid_rows: Tensor | None = None,
    ) -> None:
        self._decoder, self._lengths = decoder, list(lengths)
        self._attended, self._left = attended, left
        self._sums, self._mid_rows = sums, mid_rows
        self._masks = Masks(max(lengths))
        self._chain = Chain(decoder.n_layers)
        self._now: WatchedLayer | None = None
        self._shared = SharedValues(decoder.value_layers)
        self._final: Tensor | None = None
        self._hooked: dict[int, LayerRun] = {}  # layers with hooks of users, which are run again
        self._token_ids: Tensor | None = None  # [B, T], where hooks sit outside of layers
        self._entered: Tensor | None = None  # [B, T, D] the input of the first layer, likewise
        self._paused = False

    @property
    def resid_final(self) -> Tensor:
        """[B, T, D] what the last layer returned."""
        assert self._final is not None
        return self._final

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within, a run of the model on all texts is watched. No hook is left afterwards."""
        decoder = self._decoder
        check_hooks(decoder)
        layers = hooked_layers(decoder)
        self._hooked = {x.layer: LayerRun(x) for x in decoder.blocks if x.layer in layers}
        with ExitStack() as stack:
            stack.enter_context(evaluating(decoder.model))
            stack.enter_context(decoder.attention_through(decoder.model, self._answer))
            for block in decoder.blocks:
                for handle in self._watch(block):
                    stack.callback(handle.remove)
            stack.callback(on_end(decoder, self._chain).remove)
            if hooked_outside(decoder):
                embeddings = decoder.model.get_input_embeddings()
                stack.callback(on_input(embeddings, self._note_tokens).remove)
            yield
            self._check_entered()

    def finite(self) -> list[bool]:
        """Flags of the texts with finite states: states carry every NaN and infinity to the end.

        Raises UnsupportedArchitectureError where attention reads other keys than on the probe that
        the model was opened with, or where the residual stream is changed between layers. One
        device synchronization.
        """
        final, B = self.resid_final, len(self._lengths)
        self._shared.verify()
        of_text = [torch.isfinite(final[b, :n]).all() for b, n in enumerate(self._lengths)]
        masks, chain = self._masks.flags(), self._chain.flags()
        flags = [flag.to(final.device) for flag in (*of_text, *masks, *chain)]
        found: list[bool] = torch.stack(flags).tolist()
        end = B + len(masks)
        self._masks.check(found[B:end])
        self._chain.check(found[end:])
        return found[:B]

    def _watch(self, block: Block) -> list[torch.utils.hooks.RemovableHandle]:
        def enter(hidden: Tensor, call: LayerCall) -> None:
            if not self._paused:
                self._chain.enter(f"layer {block.name}", hidden)
                self._now = WatchedLayer(block, hidden, call)
                if block.unmixed:
                    self._answer(no_attention(block.module, hidden))
                if self._token_ids is not None and self._entered is None:
                    self._entered = hidden.clone()

        def middle(x: Tensor) -> None:
            if not self._paused:
                self._note_mid(x)

        def leave(x: Tensor) -> None:
            if not self._paused:
                layer, self._now = self._layer, None
                self._final = layer.resid_post = x.reshape(layer.resid_pre.shape)
                self._chain.leave(layer.resid_post)
                if block.layer in self._hooked:
                    self._call(self._run_again, layer)
                self._call(self._left, layer)

        run = self._hooked.get(block.layer)
        return [
            on_layer_call(block.module, enter),
            block.on_mid(middle),
            *(() if run is None else run.added.watch()),
            on_output(block.module, leave),
        ]

    def _run_again(self, layer: WatchedLayer) -> None:
        """Checks a layer with hooks of users at this text."""
        run = self._hooked.pop(layer.block.layer)
        run.check(layer.resid_pre, layer.resid_post, self._lengths, layer.call_of)

    def _note_tokens(self, token_ids: Tensor) -> None:
        if self._token_ids is None:
            self._token_ids = token_ids.reshape(len(self._lengths), -1)

    def _check_entered(self) -> None:
        """Checks the embeddings at these texts, where hooks sit outside of layers."""
        if self._token_ids is None or self._entered is None:
            return
        self._paused = True
        for ids, entered, n in zip(self._token_ids, self._entered, self._lengths, strict=True):
            check_entered(self._decoder, ids[:n], entered[:n])

    @property
    def _layer(self) -> WatchedLayer:
        assert self._now is not None
        return self._now

    def _call(self, what: Callable[[WatchedLayer], None], layer: WatchedLayer) -> None:
        self._paused = True
        try:
            what(layer)
        finally:
            self._paused = False

    def _note_mid(self, x: Tensor) -> None:
        layer = self._layer
        rows = None if self._mid_rows is None else on_device(self._mid_rows, x.device)

        def noted(y: Tensor) -> Tensor:
            return y if rows is None else y.flatten(0, 1)[rows]

        found = noted(x.reshape(layer.resid_pre.shape))
        layer.resid_mid = noted(layer.resid_pre) + found if layer.block.parallel else found
        if layer.block.layer in self._hooked:
            whole = x.reshape(layer.resid_pre.shape)
            run = self._hooked[layer.block.layer]
            run.resid_mid = (layer.resid_pre + whole if layer.block.parallel else whole).clone()

    def _answer(self, call: AttentionCall) -> Tensor:
        layer = self._layer
        check_n_keys(call, self._masks.n_tokens)
        window = window_of(layer.block, call.mask, self._masks.n_tokens)
        self._masks.see(call.mask, window)
        call = self._shared.of(layer.block.layer, call)
        if self._sums:
            z, layer.log_sum_exp = attend_and_sum(call, window)
        else:
            z = attend(call, window)
        layer.attention, layer.window, layer.z = call, window, z
        if layer.block.layer in self._hooked:
            run = self._hooked[layer.block.layer]
            run.attention, run.z = call, z
        if self._attended is not None:
            self._call(self._attended, layer)
        return z


def of_texts(call: LayerCall, texts: Tensor | slice, B: int) -> LayerCall:
    """A layer's arguments for some of B texts: a batch dimension is the first of two or more."""
    if B == 1:
        return call

    def take(x: Tensor) -> Tensor:
        return x[texts] if x.ndim >= 2 and x.shape[0] == B else x

    return LayerCall(call.n_rows, map_tensors(call.args, take), map_tensors(call.kwargs, take))
