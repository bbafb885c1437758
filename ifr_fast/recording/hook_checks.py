"""What hooks of users do at this text: the opening probe does not see what acts at some lengths, or
on some values.

Only layers that hold such hooks are checked, at every text that runs through them in one pass:

- Every row is computed again beside half of the text's rows, with the attention output that it had.
  Queries, values, `resid_mid` and the output have to be the same. So a row holds what its own
  stream and attention give, and nothing of other positions.
- The output has to be the stream that is passed on plus the outputs of the FFN's submodules.

Where hooks sit outside of layers, each row of the first layer's input has to stay the same when
half of the other tokens are exchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import UnsupportedArchitectureError
from ..model.attention import AttentionCall
from ..model.block import Block, error_of_runs, relative_error, rounding_tolerance
from ..model.decoder import Decoder
from ..model.held import wide
from ..model.hooks import LayerCall, hooked, on_input, on_output
from ..model.interface import overriding
from ..model.stream import entered_rows


def hooked_layers(decoder: Decoder) -> set[int]:
    """The layers that hold hooks of users, as of the last look at hooks (`opening.check_hooks`)."""
    places = _places(decoder)
    return {
        block.layer
        for block in decoder.blocks
        if any(_within(place, block) or place == "all modules" for place in places)
    }


def hooked_outside(decoder: Decoder) -> bool:
    """True if modules outside of layers hold hooks of users."""
    blocks = decoder.blocks
    return any(not any(_within(place, x) for x in blocks) for place in _places(decoder))


def _places(decoder: Decoder) -> set[str]:
    return {place.rpartition(": ")[0] for place, _ in decoder.checked_hooks}


def _within(place: str, block: Block) -> bool:
    return f"{place}.".startswith(f"{block.name}.")


def _refuse(block: Block, why: str, error: float) -> None:
    raise UnsupportedArchitectureError(
        f"model: at this text {why} (relative error {error:.1e}); a hook in layer {block.name} "
        "does something else there than when the model was opened"
    )


class Additions:
    """What the FFN's submodules return in one run of a layer, to be compared with its output."""

    def __init__(self, block: Block) -> None:
        self._block = block
        self._outputs: dict[nn.Module, Tensor] = {}
        self._normed: Tensor | None = None  # what the norm of the layer's output reads
        self._made: Tensor | None = None  # and what it returns

    def watch(self) -> Iterator[RemovableHandle]:
        """Hooks that note what is added."""
        for branch in self._block.branches:
            yield on_output(branch.site, lambda x, m=branch.site: self._outputs.update({m: x}))  # type: ignore[misc]
        of = self._block.residual
        if of is not None and of.post_norm is not None:
            yield on_input(of.post_norm.site, lambda x: setattr(self, "_normed", x))
            yield on_output(of.post_norm.site, lambda x: setattr(self, "_made", x))

    def check(self, resid_mid: Tensor, resid_post: Tensor) -> None:
        """Raises UnsupportedArchitectureError where `resid_post` [..., D] is not what is passed on
        of `resid_mid` [..., D] plus what was added. (In a parallel block `resid_mid` is without the
        FFN.) States that are not finite are not checked.
        """
        block, of = self._block, self._block.residual
        outputs, self._outputs = self._outputs, {}
        if not block.branches or not bool(resid_post.isfinite().all()):
            return
        target = wide(resid_post) / block.stream_scale
        error = 0.0
        if self._normed is not None and self._made is not None:
            error = relative_error(self._made.reshape(target.shape), resid_post)
            target = wide(self._normed.reshape(target.shape))
        passed = wide(resid_mid)
        if of is not None and of.mid_weight is not None:
            passed = passed * of.mid_weight
        added = torch.zeros_like(target)
        for branch in block.branches:
            if branch.site in outputs:
                x = wide(outputs[branch.site].reshape(target.shape))
                added += branch.factor * x
        beside = target.to(resid_post.dtype)
        error = max(error, relative_error(added, target - passed, beside))
        if error > rounding_tolerance(resid_post.dtype):
            _refuse(block, "its output is not resid_mid plus what its FFN returned", error)


class LayerRun:
    """One hooked layer in a pass over B texts: what is needed to run it again."""

    def __init__(self, block: Block) -> None:
        self.block, self.added = block, Additions(block)
        self.attention: AttentionCall
        self.z: Tensor  # [B, T, H, V]
        self.resid_mid: Tensor  # [B, T, D]; in a parallel block without the FFN

    def check(
        self,
        resid_pre: Tensor,
        resid_post: Tensor,
        lengths: Sequence[int],
        call_of: Callable[[int], LayerCall],
    ) -> None:
        """Raises UnsupportedArchitectureError where the output is not what the FFN added, or where
        a row is another when it is computed beside other rows.

        resid_pre, resid_post [B, T, D]; lengths: of the texts; call_of: the layer's other arguments
        for a text.
        """
        self.added.check(self.resid_mid, resid_post)
        for b, n in enumerate(lengths):
            if bool(resid_post[b, :n].isfinite().all()):
                for rows in _halves(n):
                    self._check_rows(b, rows, resid_pre, resid_post, call_of(b))

    def _check_rows(
        self, b: int, rows: Tensor, resid_pre: Tensor, resid_post: Tensor, call: LayerCall
    ) -> None:
        block, seen = self.block, self.attention
        at = rows.to(resid_pre.device)
        calls: list[AttentionCall] = []
        mids: list[Tensor] = []

        def answer(made: AttentionCall) -> Tensor:
            calls.append(made)
            return self.z[b, at][None]

        hidden = resid_pre[b, at]
        with overriding(answer), hooked(block.on_mid(mids.append)):
            output = call.at(rows)(block.module, hidden[None]).reshape(hidden.shape)
        mid = mids[-1].reshape(hidden.shape)
        pairs = [(mid + hidden if block.parallel else mid, self.resid_mid[b, at])]
        pairs.append((output, resid_post[b, at]))
        if seen.recurrence is None:
            pairs.append((_rows(calls[-1].q[0]), _rows(seen.q[b])[at]))
            if block.value_layer is None:
                pairs.append((_rows(calls[-1].v[0]), _rows(seen.v[b])[at]))
        error = max(_error(block, got, expected) for got, expected in pairs)
        if error > rounding_tolerance(resid_post.dtype):
            _refuse(block, "a row is another when it is computed beside other rows", error)


def _rows(x: Tensor) -> Tensor:
    """Heads [H, T, K] as rows [T, H * K]."""
    return x.transpose(0, 1).flatten(1)


def _halves(n: int) -> list[Tensor]:
    """Every other of n rows, and the rest; both with the last row at their end, since a hook that
    acts on a text's last token says nothing of others.
    """
    last = torch.tensor([n - 1])
    return [torch.cat([torch.arange(i, n - 1, 2), last]) for i in range(2 if n > 2 else 1)]


def _error(block: Block, got: Tensor, expected: Tensor) -> float:
    """The largest relative error of a row; the median in half precision where a layer may choose
    experts, because rounding can flip a row's choice.
    """
    lists = any(isinstance(x, nn.ModuleList) for x in block.module.modules())
    chooses = lists or any(x.ndim > 2 for x in block.module.parameters())
    return error_of_runs(got, expected) if chooses else relative_error(got, expected)


def check_entered(decoder: Decoder, token_ids: Tensor, entered: Tensor) -> None:
    """Raises UnsupportedArchitectureError if a row of the first layer's input, `entered` [T, D],
    changes with the tokens at other positions of `token_ids` [T]. The model is run without layers.
    """
    for rows in _halves(len(token_ids)):
        others = (token_ids + 1) % decoder.vocab_size
        others[rows] = token_ids[rows]
        found = entered_rows(decoder, others)[rows.to(entered.device)]
        error = relative_error(found, entered[rows.to(entered.device)])
        if error > rounding_tolerance(entered.dtype):
            raise UnsupportedArchitectureError(
                f"model: at this text {type(decoder.model).__name__} mixes the embeddings of "
                "several tokens before its first layer; a position's embedding has to be its "
                f"token's alone (relative error {error:.1e})"
            )
