"""TransparentLlm: the published tool's view of any model that `Tracer` opens.

It holds the recordings of its last `run`, one for each sentence. Larger tensors (attention
matrices, contributions of neurons, the decomposed attention) are computed when they are asked for.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...arguments import (
    as_index,
    check_flag,
    check_instance,
    check_number,
    holds_integers,
    shown,
)
from ...characters import text_tokens
from ...kernels.contract import LayerInputs
from ...model.block import Block
from ...model.modes import evaluating
from ...model.opening import probe_tokens
from ...recording.layer_inputs import layer_inputs
from ...recording.recording import Recording
from ...scoring.closure import cat_on, check_closure, closure_of
from ...tokens import encode, token_strings
from ...tracer import Tracer
from . import contributions, scores, values
from .contributions import EPSILON
from .decomposition import DecomposedAttention
from .graph import EdgeWeights
from .neurons import Neurons, basis_of, find_neurons
from .reading import (
    ModelInfo,
    NotRunError,
    attention_pattern_of,
    check_plain,
    ffn_output,
    formed_parts,
    head_outputs,
    listed_sentences,
)
from .scores import ScoredLayer, in_parity, score_attention

_DEVICES = {"gpu": "cuda", "cpu": "cpu"}


class TransparentLlm:
    """A language model and the results of its last `run`.

    model_name: a Hub name or a directory; None: the default model. hf_model, tokenizer: objects in
    memory that replace it. device: "gpu" or "cpu". dtype: the precision (a model in memory is
    copied if device or dtype change it). path: a directory to load from. supported_model_name: has
    no effect; the published app passes it to TransformerLens.

    parity: use the published tool's arithmetic and input, including its quirks; otherwise this
    project's (docs/compat-llm-transparency-tool.md). impl: as in `Tracer`, which also defines the
    models that can be opened.

    Methods take a sentence's index in the batch, a layer and a position, and return the published
    tool's shapes. Shorter sentences are padded on the right; results for padding are 0.
    """

    parity = False  # the default

    def __init__(
        self,
        model_name: str | os.PathLike[str] | None = None,
        hf_model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        supported_model_name: str | None = None,
        path: str | os.PathLike[str] | None = None,
        *,
        parity: bool | None = None,
        impl: str = "auto",
    ) -> None:
        if device is not None and device not in _DEVICES:
            raise ValueError(f"device: expected 'gpu' or 'cpu', got {device!r}")
        place = None if device is None else torch.device(_DEVICES[device])
        if hf_model is None:
            from ...model.pretrained import load

            options = {} if dtype is None else {"dtype": dtype}
            hf_model, own = load(model_name if path is None else path, **options)
            tokenizer = own if tokenizer is None else tokenizer
            if place is not None:
                hf_model = hf_model.to(place)
        else:
            moves = place is not None and place.type != hf_model.device.type
            if moves or dtype not in (None, hf_model.dtype):
                hf_model = copy.deepcopy(hf_model).to(device=place, dtype=dtype)
        self._open(Tracer(hf_model, tokenizer, impl=impl), model_name, parity)

    @classmethod
    def of(cls, tracer: Tracer, *, parity: bool | None = None) -> Self:
        """A TransparentLlm of a model that a `Tracer` has opened."""
        check_instance("tracer", tracer, Tracer)
        made = cls.__new__(cls)
        made._open(tracer, None, parity)
        return made

    def _open(
        self, tracer: Tracer, name: str | os.PathLike[str] | None, parity: bool | None
    ) -> None:
        self.tracer = tracer
        if parity is not None:
            self.parity = check_flag("parity", parity)
        self._name = str(name or getattr(tracer.model.config, "_name_or_path", "") or "")
        self._recordings: list[Recording] | None = None
        self._value_bias: list[Tensor] | None = None
        check_plain(tracer.decoder)
        if self.parity:
            if any(block.parallel for block in tracer.decoder.blocks):
                raise ValueError(
                    "parity: the published tool needs a residual stream between attention and "
                    "FFN, and this model's blocks are parallel; expected parity=False"
                )
            probe = tracer.record(probe_tokens(tracer.decoder), mode="full")
            self._value_bias = values.biases(probe)

    def copy(self) -> Self:
        """Another TransparentLlm of the same model, whose `run` does not change this one."""
        return copy.copy(self)

    def model_info(self) -> ModelInfo:
        """Sizes of the model, known before any `run`."""
        decoder = self.tracer.decoder
        return ModelInfo(
            name=self._name,
            n_params_estimate=sum(x.numel() for x in decoder.model.parameters()),
            n_layers=decoder.n_layers,
            n_heads=decoder.n_heads,
            d_model=decoder.d_model,
            d_vocab=decoder.vocab_size,
        )

    def run(self, sentences: str | Sequence[Any]) -> None:
        """Runs the model on a batch of sentences (or of token ids) and keeps the recordings.

        In parity a string begins with one beginning-of-sequence token; otherwise it begins with the
        tokens that the tokenizer adds.
        """
        given = [sentences] if isinstance(sentences, str) else listed_sentences(sentences)
        if not given:
            raise ValueError("sentences: is empty; expected at least one")
        texts = [self._with_start(x) if self.parity and isinstance(x, str) else x for x in given]
        self._recordings = self.tracer.record(
            [encode(text, self.tracer.tokenizer, None) for text in texts]
        )

    def _with_start(self, sentence: str) -> list[int]:
        """Token ids that begin with the beginning-of-sequence token."""
        tokenizer = self.tracer.tokenizer
        if tokenizer is None:
            raise ValueError("sentences: this model has no tokenizer; pass token ids")
        start = tokenizer.bos_token_id
        start = tokenizer.eos_token_id if start is None else start
        ids: list[int] = tokenizer(sentence)["input_ids"]
        if start is None or tokenizer("")["input_ids"][:1] == [start]:
            return ids
        return [int(start), *ids]

    def batch_size(self) -> int:
        """Number of sentences in the last `run`."""
        return len(self._ran())

    def tokens(self) -> Tensor:
        """Token ids [batch, pos]."""
        tokenizer = self.tracer.tokenizer
        padding = None if tokenizer is None else tokenizer.pad_token_id
        return self._of_all(lambda recording: recording.token_ids, padding or 0)

    def tokens_to_strings(self, tokens: Tensor) -> list[str]:
        """The text of each token [pos] by itself. In a sentence of the last `run`, pieces of a
        character are labelled with it.
        """
        if not isinstance(tokens, Tensor) or tokens.ndim != 1 or not holds_integers(tokens):
            raise ValueError(f"tokens: expected token ids [pos], got {shown(tokens)}")
        ran = any(torch.equal(tokens.cpu(), x.token_ids) for x in self._recordings or ())
        return (text_tokens if ran else token_strings)(tokens, self.tracer.tokenizer)

    def logits(self) -> Tensor:
        """[batch, pos, d_vocab]"""
        head = self.tracer.decoder.head
        return self._of_all(lambda recording: head(recording.states))

    @torch.inference_mode()
    def unembed(self, t: Tensor, normalize: bool) -> Tensor:
        """Logits [d_vocab] that the model's head computes from a vector [D].

        normalize: apply the final norm first, as the model does to its last layer's output.
        """
        decoder = self.tracer.decoder
        check_flag("normalize", normalize)
        if check_instance("t", t, Tensor).shape != (decoder.d_model,):
            raise ValueError(f"t: expected shape [{decoder.d_model}], got {list(t.shape)}")
        t = t.to(decoder.device, decoder.dtype)
        if not normalize:
            return decoder.head(t[None])[0]
        with (
            evaluating(decoder.model),
            decoder.overriding_layers(lambda *_: t[None, None]),
        ):
            return decoder.forward(torch.zeros(1, dtype=torch.int64))[1]

    def residual_in(self, layer: int) -> Tensor:
        """The residual stream before a layer [batch, pos, D]."""
        layer = self._layer(layer)
        return self._of_all(lambda recording: recording.layers[layer].resid_pre)

    def residual_after_attn(self, layer: int) -> Tensor:
        """The residual stream between a layer's attention and its FFN [batch, pos, D].

        Raises ValueError in a parallel block, which has none.
        """
        layer = self._layer(layer)
        if self.tracer.decoder.blocks[layer].parallel:
            raise ValueError(
                f"layer: layer {layer} is a parallel block, without a residual stream between "
                "attention and FFN"
            )
        return self._of_all(lambda recording: self._node(recording, layer)[0].y)

    def residual_out(self, layer: int) -> Tensor:
        """The residual stream after a layer [batch, pos, D]."""
        layer = self._layer(layer)
        return self._of_all(lambda recording: recording.resid_post(layer))

    def ffn_out(self, layer: int) -> Tensor:
        """The output of a layer's FFN, added to the residual stream [batch, pos, D]."""
        layer = self._layer(layer)
        return self._of_all(lambda recording: ffn_output(*self._node(recording, layer)))

    def decomposed_ffn_out(self, batch_i: int, layer: int, pos: int) -> Tensor:
        """The output of each neuron, added to the residual stream [hidden, D]."""
        neurons = self._find_neurons(batch_i, layer, pos)
        return neurons.activations[:, None] * neurons.outputs

    def neuron_activations(self, batch_i: int, layer: int, pos: int) -> Tensor:
        """The hidden layer after its activation function [hidden], including gates.

        In parity it is before the function, as in the tool. Raises ValueError if the FFN has no
        separate neurons.
        """
        neurons = self._find_neurons(batch_i, layer, pos)
        if not self.parity:
            return neurons.activations
        if neurons.before is None:
            raise ValueError(
                f"layer: the activation function of layer {layer} is not a module, so its input "
                "cannot be read; expected parity=False"
            )
        return neurons.before

    def neuron_output(self, layer: int, neuron: int) -> Tensor:
        """The output [D] of a neuron with an activation of 1, added to the residual stream.

        Raises ValueError if a norm follows the FFN, since the output then depends on the position.
        """
        layer = self._layer(layer)
        basis = basis_of(self.tracer.neuron_bases, layer)
        if basis.row_scaled:
            raise ValueError(
                f"layer: a norm after the FFN of layer {layer} scales the outputs of neurons at "
                "each position differently; see decomposed_ffn_out"
            )
        return basis.W[self._index("neuron", neuron, len(basis.W))]

    def attention_matrix(self, batch_i: int, layer: int, head: int) -> Tensor:
        """Attention weights of a head [query_pos, key_pos], lower triangular."""
        recording, layer = self._sentence(batch_i), self._layer(layer)
        head = self._index("head", head, self.tracer.decoder.n_heads)
        pattern = attention_pattern_of(self._node(recording, layer)[0])[head]
        missing = self._length() - len(recording)
        return F.pad(pattern, (0, missing, 0, missing))

    def attention_output(self, batch_i: int, layer: int, pos: int) -> Tensor:
        """The output [D] of a layer's attention, with its bias, added to the residual stream."""
        recording, layer = self._sentence(batch_i), self._layer(layer)
        pos = self._index("pos", pos, len(recording))
        inputs, _ = self._node(recording, layer)
        of_ffn = 0 if inputs.ffn is None else inputs.ffn[pos]
        return inputs.y[pos] - inputs.resid_pre[pos] - of_ffn

    def attention_output_per_head(self, batch_i: int, layer: int, pos: int, head: int) -> Tensor:
        """The output [D] of one head, added to the residual stream: the sum of its parts."""
        recording, layer = self._sentence(batch_i), self._layer(layer)
        pos = self._index("pos", pos, len(recording))
        head = self._index("head", head, self.tracer.decoder.n_heads)
        inputs, _ = self._node(recording, layer)
        z = head_outputs(inputs, pos)
        if inputs.value_gate is not None:
            z = z * inputs.value_gate[pos]
        added = z[head] @ inputs.W_O[head].to(z.dtype)
        return added if inputs.row_scale is None else inputs.row_scale[pos] * added

    def decomposed_attn(self, batch_i: int, layer: int) -> Tensor:
        """The parts of attention [pos, key_pos, head, D], from each token through each head.

        The tensor is formed when something reads it; `get_attention_contributions` does not.
        """
        recording, layer = self._sentence(batch_i), self._layer(layer)
        inputs, _ = self._node(recording, layer)
        length, missing = self._length(), self._length() - len(recording)

        def form() -> Tensor:
            return F.pad(formed_parts(inputs), (0, 0, 0, 0, 0, missing, 0, missing))

        def score(resid_pre: Tensor, resid_mid: Tensor, parity: bool) -> tuple[Tensor, Tensor]:
            node = inputs._replace(
                resid_pre=resid_pre[: len(recording)], y=resid_mid[: len(recording)], ffn=None
            )
            node = in_parity(node) if parity else node
            found = scores.contributions([score_attention(node, 0.0, self.tracer.kernel)])
            return (
                F.pad(found.dense(), (0, 0, 0, missing, 0, missing)),
                F.pad(found.residual, (0, missing)),
            )

        H, _, D = inputs.W_O.shape
        dtype = torch.promote_types(inputs.y.dtype, torch.float32)
        return DecomposedAttention(
            (length, length, H, D), dtype, inputs.y.device, functools.cache(form), score
        )

    @torch.inference_mode()
    def edge_weights(self, batch_i: int, threshold: float | None) -> EdgeWeights:
        """Edges of the full graph; with a threshold, those above it, renormalized.

        Raises IfrError if the parts do not add up to the model's own activations.
        """
        if threshold is not None:
            name = "renormalizing_threshold"
            threshold = check_number(name, threshold, "a number or None")
        recording, blocks = self._sentence(batch_i), self.tracer.decoder.blocks
        keep = 0.0 if threshold is None else max(0.0, threshold)
        scored, mids, posts, closures = [], {}, {}, {}
        with recording.replaying():
            for block in blocks:
                inputs, resid_post = self._inputs(recording, block.layer)
                shifted = in_parity(inputs) if self.parity else inputs
                layer = score_attention(shifted, keep, self.tracer.kernel)
                scored.append(layer)
                closures[block.layer] = self._closure(inputs, shifted, layer, block)
                if resid_post is not None:
                    mids[block.layer], posts[block.layer] = inputs.y, resid_post
        check_closure(closures)
        attention = scores.contributions(scored)
        if threshold is not None:
            attention = attention.renormalized(threshold, self.parity)
        residual = attention.residual.view(len(blocks), -1)
        of_ffn = {}
        if mids:  # all layers at once
            mid, post = (cat_on(residual.device, x.values()) for x in (mids, posts))
            found = scores.score_ffn(mid, post, self.parity, self.tracer.kernel)
            pairs = zip(*(x.split(residual.shape[1]) for x in found), strict=True)
            of_ffn = dict(zip(mids, pairs, strict=True))
        if threshold is not None:
            cut = contributions.apply_threshold_and_renormalize
            of_ffn = {i: cut(threshold, *x, parity=self.parity) for i, x in of_ffn.items()}
        in_parallel = [(x, torch.zeros_like(x)) for x in attention.ffn.view_as(residual)]
        ffn, ffn_residual = (
            cat_on(residual.device, parts).view_as(residual)
            for parts in zip(*(of_ffn.get(i, x) for i, x in enumerate(in_parallel)), strict=True)
        )
        parallel = torch.tensor([block.parallel for block in blocks])
        return EdgeWeights(*attention.token_edges(), residual, ffn, ffn_residual, parallel)

    def _closure(
        self,
        inputs: LayerInputs,
        shifted: LayerInputs,
        layer: ScoredLayer,
        block: Block,
    ) -> Tensor:
        """[T] errors of a layer's sums of parts, as they were scored: of `inputs`, or in parity of
        `shifted`.
        """
        bias, linear = block.bias.to(inputs.y.device), layer.scores.linear
        if self._value_bias is None:
            return closure_of(inputs, linear, bias)
        if bool(self._value_bias[block.layer].any()):
            bias = bias + self._moved_by_bias(inputs, block.layer)
        # Rounding is that of the model, even if y is wider.
        eps = torch.finfo(inputs.resid_pre.dtype).eps
        return closure_of(shifted, linear, bias - EPSILON, eps)

    def _moved_by_bias(self, inputs: LayerInputs, layer: int) -> Tensor:
        """The effect of a layer's value bias on the residual stream: [T, D], or [1, D] if it is the
        same for all rows.
        """
        assert self._value_bias is not None
        z = self._value_bias[layer]
        z = z.repeat_interleave(len(inputs.W_O) // len(z), 0)[None]  # [1, H, V]
        if inputs.value_gate is not None:
            z = z * inputs.value_gate
        moved = z.flatten(1) @ inputs.W_O.to(z.dtype).flatten(0, 1)
        return moved if inputs.row_scale is None else inputs.row_scale[:, None] * moved

    def _ran(self) -> list[Recording]:
        if self._recordings is None:
            raise NotRunError("nothing was run yet: call `run` first")
        return self._recordings

    def _length(self) -> int:
        return max(map(len, self._ran()))

    def _sentence(self, batch_i: int) -> Recording:
        recordings = self._ran()
        return recordings[self._index("batch_i", batch_i, len(recordings))]

    def _layer(self, layer: int) -> int:
        return self._index("layer", layer, self.tracer.decoder.n_layers)

    @staticmethod
    def _index(name: str, i: int, n: int) -> int:
        if not -n <= as_index(name, i) < n:
            raise ValueError(f"{name}: expected {-n} to {n - 1}, got {i}")
        return i % n

    def _of_all(self, of: Callable[[Recording], Tensor], padding: int = 0) -> Tensor:
        """`of` each sentence [pos, ...], together [batch, pos, ...]."""
        found, length = [of(recording) for recording in self._ran()], self._length()
        if len(found) == 1:
            return found[0][None]
        out = found[0].new_full((len(found), length, *found[0].shape[1:]), padding)
        for row, x in zip(out, found, strict=True):
            row[: len(x)] = x
        return out

    @torch.inference_mode()
    def _node(self, recording: Recording, layer: int) -> tuple[LayerInputs, Tensor | None]:
        with recording.replaying():
            return self._inputs(recording, layer)

    def _inputs(self, recording: Recording, layer: int) -> tuple[LayerInputs, Tensor | None]:
        """A layer's nodes and their parts; in parity, values are without their bias."""
        inputs, post, _ = layer_inputs(recording, layer, torch.arange(len(recording)))
        if self._value_bias is not None and bool(self._value_bias[layer].any()):
            inputs = inputs._replace(v=inputs.v - self._value_bias[layer])
        return inputs, None if post is None else post.y

    def _find_neurons(self, batch_i: int, layer: int, pos: int) -> Neurons:
        recording, layer = self._sentence(batch_i), self._layer(layer)
        pos = self._index("pos", pos, len(recording))
        ffn = ffn_output(*self._node(recording, layer))[pos]
        return find_neurons(recording, layer, pos, self.tracer.neuron_bases, ffn)
