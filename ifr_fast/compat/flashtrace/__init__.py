"""FlashTrace (PyPI flashtrace 0.1.1) on this engine: which prompt tokens shaped an answer.

    from ifr_fast.compat.flashtrace import FlashTrace  # in place of flashtrace's own

A token's score is the sum over layers of the importances of the attention edges that read it. No
routes are followed. The methods are:

- ifr-matrix: every generated token's row is scored, and the scores are averaged.
- ifr-span: the rows of a span are added up first, and their sum is scored as one row.
- flashtrace: the span method in several hops. The scores of generated tokens in one hop are the
  weights by which the next hop adds up their rows. Scores of prompt tokens are collected, times the
  share of all scores that earlier hops left on generated tokens. Stop tokens are left out.

docs/compat-flashtrace.md lists the differences from the package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from ...arguments import (
    MOST,
    as_index,
    check_choice,
    check_count,
    check_flag,
    check_instance,
    check_number,
    check_unicode,
    listed,
    shown,
)
from ...tracer import Tracer
from .result import TokenScore, TraceResult
from .scores import IFRAggregate, IFRLayerResult, Options, aggregate, token_matrix
from .text import STOP_TOKENS, Text, read

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "STOP_TOKENS",
    "FlashTrace",
    "IFRAggregate",
    "IFRLayerResult",
    "MultiHopIFRResult",
    "TokenScore",
    "TraceResult",
    "load_model_and_tokenizer",
]

TraceMethod = Literal["flashtrace", "ifr-span", "ifr-matrix"]
Span: TypeAlias = tuple[int, int]  # the first and the last of some generated tokens

_EPS = 1e-12  # added to every denominator


class MultiHopIFRResult(NamedTuple):
    """All hops of the method "flashtrace"."""

    raw_attributions: list[IFRAggregate]
    thinking_ratios: list[float]  # share of all scores that is left after each hop
    observation: dict[str, Tensor | list[Tensor]]


class FlashTrace:
    """FlashTrace's scores for any model that `Tracer` opens, with any attention function.

    chunk_tokens, sink_chunk_tokens, recompute_attention: have no effect. They limit the package's
    memory; here neither a decomposed tensor nor attention weights are stored. generate_kwargs:
    arguments of `model.generate` if `trace` gets no target; default: 512 new tokens, greedily.
    use_chat_template: apply the tokenizer's chat template to prompts. parity: compute values as the
    package does, without the bias of a v_proj and with 1e-6 as the epsilon of Llama-like norms;
    False: take the values that the model's attention read. impl, max_memory: as in `Tracer`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chunk_tokens: int = 128,
        sink_chunk_tokens: int = 32,
        recompute_attention: bool = False,
        generate_kwargs: dict[str, Any] | None = None,
        use_chat_template: bool = False,
        parity: bool = True,
        impl: str = "auto",
        max_memory: int | str | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.chunk_tokens = check_count("chunk_tokens", chunk_tokens)
        self.sink_chunk_tokens = check_count("sink_chunk_tokens", sink_chunk_tokens)
        self.recompute_attention = check_flag("recompute_attention", recompute_attention)
        if generate_kwargs is not None:
            check_instance("generate_kwargs", generate_kwargs, dict)
        self.generate_kwargs = generate_kwargs
        self.use_chat_template = check_flag("use_chat_template", use_chat_template)
        self.parity = check_flag("parity", parity)
        if tokenizer is None:
            raise ValueError("tokenizer: expected a transformers tokenizer, got None")
        self.tracer = Tracer(model, tokenizer, impl=impl, max_memory=max_memory)

    def trace(
        self,
        *,
        prompt: str,
        target: str | None = None,
        output_span: Span | None = None,
        reasoning_span: Span | None = None,
        hops: int = 1,
        method: TraceMethod = "flashtrace",
        renorm_threshold: float | None = None,
    ) -> TraceResult:
        """Scores the prompt's tokens by their contribution to the generated tokens.

        target: the generated text, to which the tokenizer's end-of-text token is added; None: the
        model generates it. output_span, reasoning_span: spans of generated tokens, the second only
        for the method "flashtrace"; default: all. renorm_threshold: proximities below it count as
        0, those of single heads and keys and those of FFNs.

        Raises ValueError for an unknown method, for a span outside of the generated tokens, and if
        the prompt is not found in the output of the chat template.
        """
        check_choice("method", method, get_args(TraceMethod))
        check_unicode("prompt", prompt)
        if target is not None:
            check_unicode("target", target)
        output_span = _as_span("output_span", output_span)
        reasoning_span = _as_span("reasoning_span", reasoning_span)
        hops = check_count("hops", hops, least=-MOST)  # below 0, as the package: none
        if renorm_threshold is not None:
            renorm_threshold = check_number("renorm_threshold", renorm_threshold, "a number")
        text = read(
            self.model,
            self.tokenizer,
            prompt,
            target,
            use_chat_template=self.use_chat_template,
            generate_kwargs=self.generate_kwargs,
        )
        options = Options(float(renorm_threshold or 0), self.parity)
        match method:
            case "ifr-matrix":
                matrix, about = self._matrix(text, output_span, options)
            case "ifr-span":
                matrix, about = self._span(text, output_span, options)
            case "flashtrace":
                matrix, about = self._hops(text, output_span, reasoning_span, hops, options)
        n_prompt = len(text.user_prompt_tokens)
        if "observation_projected" in about:
            scores = about["observation_projected"]["sum"][:n_prompt]
        else:
            first, last = (0, len(matrix) - 1) if output_span is None else output_span
            rows = text.project(matrix.nan_to_num(nan=0.0))[first : last + 1, :n_prompt]
            scores = rows.mean(0) if rows.numel() else torch.zeros(n_prompt)
        return TraceResult(
            prompt_tokens=text.user_prompt_tokens,
            generation_tokens=text.generation_tokens,
            scores=scores.tolist(),
            per_hop_scores=[x[:n_prompt].tolist() for x in about.get("per_hop_projected", [])],
            thinking_ratios=list(about.get("thinking_ratios", [])),
            output_span=output_span,
            reasoning_span=reasoning_span,
            method=method,
            metadata={"ifr": about | {"renorm_threshold": options.threshold}, "method": method},
        )

    # Each method returns scores [generated tokens, T], NaN outside of the span, and metadata.

    def _matrix(
        self, text: Text, span: Span | None, options: Options
    ) -> tuple[Tensor, dict[str, Any]]:
        about: dict[str, Any] = {"type": "all_positions_output_only"}
        matrix = _unscored(text)
        if len(matrix) == 0:
            return matrix, about | {
                "sink_span_generation": None,
                "sink_indices": [],
                "note": "no generation",
            }
        first, last = _checked("output_span", span, len(matrix) - 1)
        begin, end = text.at(first), text.at(last)
        recording = self.tracer.record(text.token_ids)
        matrix[first : last + 1] = token_matrix(self.tracer, recording, begin, end + 1, options)
        return matrix, about | {
            "sink_span_generation": (first, last),
            "sink_span_absolute": (begin, end),
            "sink_indices": list(range(begin, end + 1)),
            "note": "" if span is not None else "no output_span: all that was generated",
        }

    def _span(
        self, text: Text, span: Span | None, options: Options
    ) -> tuple[Tensor, dict[str, Any]]:
        about: dict[str, Any] = {"type": "sentence_aggregate"}
        matrix = _unscored(text)
        if len(matrix) == 0:
            return matrix, about | {"sink_span_generation": None, "note": "no generation"}
        first, last = _checked("output_span", span, len(matrix) - 1)
        begin, end = text.at(first), text.at(last)
        recording = self.tracer.record(text.token_ids)
        found = aggregate(self.tracer, recording, begin, end + 1, options)
        matrix[first : last + 1] = found.token_importance_total
        return matrix, about | {
            "sink_span_generation": (first, last),
            "sink_span_absolute": (begin, end),
            "aggregate": found,
        }

    def _hops(
        self,
        text: Text,
        output_span: Span | None,
        reasoning_span: Span | None,
        n_hops: int,
        options: Options,
    ) -> tuple[Tensor, dict[str, Any]]:
        about: dict[str, Any] = {
            "type": "multi_hop_both",
            "sink_span_generation": output_span,
            "thinking_span_generation": reasoning_span,
            "stop_config": {
                "stop_tokens": list(STOP_TOKENS),
                "skip_whitespace": True,
                "strip_before_match": True,
            },
        }
        matrix = _unscored(text)
        n_last = text.last_attributable(self.tokenizer.eos_token_id)
        if n_last < 0:
            return matrix, about | {"note": "no generation besides an end of text"}
        first, last = _checked("output_span", output_span, n_last)
        thinking = (
            None if reasoning_span is None else _checked("reasoning_span", reasoning_span, n_last)
        )
        around = (0, n_last)
        if output_span is not None and thinking is not None:
            around = (min(first, thinking[0]), max(last, thinking[1]))
        begin, end = text.at(around[0]), text.at(around[1])
        recording = self.tracer.record(text.token_ids)
        kept = text.kept()
        observed = kept.clone()
        observed[begin:] = 0

        weights = torch.tensor([not text.is_stop(i) for i in range(around[0], around[1] + 1)])
        hops: list[IFRAggregate] = []
        seen: list[Tensor] = []  # scores of the prompt in each hop
        ratios: list[float] = []
        ratio = 1.0
        for hop in range(max(0, n_hops) + 1):
            if ratio > 0:
                unweighted = hop == 0 and bool(weights.all())
                found = aggregate(
                    self.tracer,
                    recording,
                    begin,
                    end + 1,
                    options,
                    None if unweighted else weights,
                )
            else:  # no scores are left on generated tokens
                found = IFRAggregate.zero(
                    len(kept), recording.decoder.n_layers, recording.decoder.n_heads
                )
            found.token_importance_total *= kept
            hops.append(found)
            seen.append(found.token_importance_total * observed * ratio)
            weights = found.token_importance_total[begin : end + 1]
            left, total = float(weights.sum()), float(found.token_importance_total.sum())
            ratio *= left / (total + _EPS)
            ratios.append(ratio)

        collected = torch.stack(seen).sum(0)
        for i in range(first, last + 1):
            if not text.is_stop(i):
                matrix[i] = collected
        observation: dict[str, Tensor | list[Tensor]] = {
            "mask": observed,
            "base": seen[0],
            "per_hop": seen[1:],
            "sum": collected,
            "avg": collected / max(1, n_hops),
        }
        return matrix, about | {
            "sink_span_generation": (first, last),
            "sink_span_absolute": (text.at(first), text.at(last)),
            "thinking_span_generation": thinking,
            "thinking_span_absolute": (
                None if thinking is None else (text.at(thinking[0]), text.at(thinking[1]))
            ),
            "all_gen_span_generation": around,
            "all_gen_span_absolute": (begin, end),
            "n_hops": n_hops,
            "thinking_ratios": ratios,
            "per_hop_projected": [text.project(hop.token_importance_total) for hop in hops],
            "observation_projected": {
                name: [text.project(x) for x in of] if isinstance(of, list) else text.project(of)
                for name, of in observation.items()
            },
            "raw": MultiHopIFRResult(hops, ratios, observation),
            "note": "without stop tokens and the end of text; all hops over all of the span",
        }


def _unscored(text: Text) -> Tensor:
    return torch.full((len(text.generation_ids), len(text.token_ids)), torch.nan)


def _as_span(name: str, span: Span | None) -> Span | None:
    """The span as two ints."""
    if span is None:
        return None
    bounds = listed(name, span)
    if len(bounds) != 2:
        raise ValueError(f"{name}: expected (first, last), got {shown(span)}")
    return as_index(name, bounds[0]), as_index(name, bounds[1])


def _checked(name: str, span: Span | None, last: int) -> Span:
    """The span, or all generated tokens if it is None; `last` is the last valid index."""
    begin, end = (0, last) if span is None else span
    if not 0 <= begin <= end <= last:
        raise ValueError(f"{name}: expected first and last from 0 to {last}, got {(begin, end)}")
    return begin, end


def load_model_and_tokenizer(
    model_name_or_path: str,
    *,
    device_map: str | dict[str, Any] | None = "auto",
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    **model_kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A Hugging Face causal LM in eval mode, and its tokenizer with a padding token.

    dtype: a torch dtype, or "auto", "float16", "fp16", "bfloat16", "bf16", "float32", "fp32".
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    short = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
    if isinstance(dtype, str):
        dtype = short.get(dtype.lower(), dtype.lower())
        if dtype not in ("auto", *short.values()):
            raise ValueError(f"dtype: expected auto, float16, bfloat16 or float32, got {dtype!r}")
    tokenizer = AutoTokenizer.from_pretrained(
        model_name_or_path, trust_remote_code=trust_remote_code
    )
    model = AutoModelForCausalLM.from_pretrained(
        model_name_or_path,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        **model_kwargs,
    ).eval()
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer
