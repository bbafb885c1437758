"""Attributions of predictions to input tokens by several methods, and how faithful they are.

deletion.py defines the curves. By FlashTrace's protocol the last token is deleted like any other. A
method that ranks it first, the position where the answer is predicted, then wins because it breaks
the prediction, and not because it finds what the prediction rests on. So all curves can also be
computed with the last token left in place.

Attributions are numbers of at least 0 for each token; attributions with signs count by their size.

- Routes: the weight of all paths from the prediction to a token.
- Direct reads: the importances of what one row read by attention, summed over layers. That is
  FlashTrace's arithmetic, computed by this project's kernels: no path leads on from what was read.
- "Answer appended": both explain the position of the answer itself, put behind the prompt, as
  FlashTrace does, in place of the position before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import needing
from ..model.decoder import Decoder
from ..model.modes import evaluating
from ..progress import progress
from ..tokens import token_strings
from ..tracer import Tracer
from .deletion import (
    STEPS,
    STOP_TOKENS,
    Curves,
    deletion_groups,
    insertion_area,
    mass_left,
    padding_id,
    rise_and_mas,
)
from .faithfulness import attention_weights
from .interventions import run, text_batches
from .tasks import Prompt, Task

_IG_STEPS = 32
_THRESHOLD = 0.01  # threshold of the routes
Attribution = Callable[[Tracer, Task, int], Tensor]  # tracer, task, index of a prompt -> [T]


def token_faithfulness(
    tracer: Tracer,
    task: Task,
    methods: Sequence[str] | None = None,
    *,
    steps: int = STEPS,
    keep_last: bool = False,
    seed: int = 0,
) -> dict[str, list[Curves]]:
    """Curves of every prompt under each of `methods`, and under "random", a random order.

    methods: some of `METHODS`; default: all that can run here. keep_last: never delete the last
    token.
    """
    chosen = available(tracer) if methods is None else list(methods)
    for name in chosen:
        if name not in METHODS:
            raise ValueError(f"methods: expected some of {', '.join(METHODS)}, got {name!r}")
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[Curves]] = {name: [] for name in (*chosen, "random")}
    with progress("input tokens", len(task)) as show:
        for i, prompt in enumerate(task.prompts):
            attributions = {name: METHODS[name](tracer, task, i) for name in chosen}
            attributions["random"] = torch.rand(len(prompt.token_ids), generator=generator)
            for name, curves in _curves(tracer, task, i, attributions, steps, keep_last).items():
                found[name].append(curves)
            show(i + 1)
    return found


def _curves(
    tracer: Tracer,
    task: Task,
    i: int,
    attributions: dict[str, Tensor],
    steps: int,
    keep_last: bool,
) -> dict[str, Curves]:
    prompt = task.prompts[i]
    whole = torch.tensor(prompt.token_ids)
    strings = token_strings(whole, tracer.tokenizer)
    among = [t for t, string in enumerate(strings) if string.strip() not in STOP_TOKENS]
    if keep_last:
        among = [t for t in among if t != len(whole) - 1]
    pad = padding_id(tracer)
    empty = whole.clone()
    empty[among] = pad
    texts, groups_of = [], {}
    for name, attribution in attributions.items():
        groups_of[name] = groups = deletion_groups(attribution, among, steps)
        for start, end in ((whole, empty), (empty, whole)):
            text = start.clone()
            texts.append(text)
            for group in groups:
                text = text.clone()
                text[group] = end[group]
                texts.append(text)
    log = _log_probability(tracer.decoder, task, i, texts)
    curves = {}
    for name, groups in groups_of.items():
        deletion, insertion, log = log.tensor_split((len(groups) + 1, 2 * len(groups) + 2))
        left = mass_left(attributions[name], groups)
        curves[name] = Curves(*rise_and_mas(deletion, left), insertion_area(insertion))
    return curves


def _log_probability(decoder: Decoder, task: Task, i: int, texts: list[Tensor]) -> Tensor:
    """Log probabilities [N] of prompt i's right tokens after each of N texts."""
    found = torch.zeros(len(texts), dtype=torch.float64)
    for together in text_batches(decoder, [len(text) for text in texts]):
        logits = run(decoder, [texts[j] for j in together])
        which = torch.full((len(together),), i)
        found[together] = task.probability(logits, which).log().cpu()
    return found


def _with_answer(tracer: Tracer, task: Task, i: int) -> list[int]:
    """Prompt i followed by its likeliest right token."""
    text = task.texts[i]
    logits = run(tracer.decoder, [text])[0]
    return [*text, max(task.prompts[i].right, key=lambda token: float(logits[token]))]


def _routes(tracer: Tracer, task: Task, i: int) -> Tensor:
    return tracer.trace(task.texts[i], threshold=_THRESHOLD).token_importance()


def _routes_of_answer(tracer: Tracer, task: Task, i: int) -> Tensor:
    text = _with_answer(tracer, task, i)
    return tracer.trace(text, threshold=_THRESHOLD).token_importance()[:-1]


def direct_reads(tracer: Tracer, text: Sequence[int]) -> Tensor:
    """Importances [T] float32 of what a text's last row reads from each token by attention, summed
    over heads and layers.
    """
    found = torch.zeros(len(text))
    for scores in tracer.contributions(text, rows=[-1], keep=0):
        edges = scores.token_edges
        found.index_add_(0, edges.source.cpu(), edges.weight.float().cpu())
    return found


def _reads(tracer: Tracer, task: Task, i: int) -> Tensor:
    return direct_reads(tracer, task.texts[i])


def _reads_of_answer(tracer: Tracer, task: Task, i: int) -> Tensor:
    return direct_reads(tracer, _with_answer(tracer, task, i))[:-1]


def _rollout(tracer: Tracer, task: Task, i: int) -> Tensor:
    """Attention rollout (Abnar & Zuidema 2020): heads' mean weights plus the residual stream."""
    weights = attention_weights(tracer.decoder, task.texts[i]).double().mean(1)  # [L, T, T]
    flow = torch.zeros(weights.shape[-1], dtype=torch.float64)
    flow[-1] = 1
    for of_layer in weights.flip(0):
        augmented = of_layer + torch.eye(len(of_layer), dtype=torch.float64)
        flow = flow @ (augmented / augmented.sum(-1, keepdim=True))
    return flow.float()


def _embedding_attribution(
    tracer: Tracer, prompt: Prompt, attribute: Callable[[Any, Tensor, Tensor], Tensor]
) -> Tensor:
    """Sizes [T] of an attribution to embeddings, summed over D.

    attribute: takes a function from embeddings [B, T, D] to the right tokens' log probability, the
    embeddings [1, T, D] of the text, and those of padding.
    """
    model = tracer.decoder.model
    right = torch.tensor(prompt.right, device=tracer.decoder.device)
    ids = torch.tensor([prompt.token_ids], device=tracer.decoder.device)

    def log_probability(embeddings: Tensor) -> Tensor:
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
        logits = model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits
        return logits[:, -1].float().log_softmax(-1)[:, right].logsumexp(-1)

    embed = model.get_input_embeddings()
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
        with torch.no_grad():
            given, padding = embed(ids), embed(torch.full_like(ids, padding_id(tracer)))
        found = attribute(log_probability, given, padding)
    return found[0].detach().sum(-1).abs().float().cpu()


def _gradient_x_input(tracer: Tracer, task: Task, i: int) -> Tensor:
    with needing("gradient x input", "captum", _REMEDY):
        from captum.attr import InputXGradient

    return _embedding_attribution(
        tracer,
        task.prompts[i],
        lambda f, given, _: InputXGradient(f).attribute(given.requires_grad_()),
    )


def _integrated_gradients(tracer: Tracer, task: Task, i: int) -> Tensor:
    with needing("integrated gradients", "captum", _REMEDY):
        from captum.attr import IntegratedGradients

    return _embedding_attribution(
        tracer,
        task.prompts[i],
        lambda f, given, padding: IntegratedGradients(f).attribute(
            given, padding, n_steps=_IG_STEPS, internal_batch_size=_IG_STEPS
        ),
    )


def flashtrace_arguments(model: PreTrainedModel, token_ids: Tensor) -> dict[str, Any]:
    """Arguments of FlashTrace's functions (flashtrace.core, 0.1.1) for token ids [T].

    They hold its own recording of a pass with eager attention, the only one that returns weights.
    """
    with needing("the method FlashTrace", "flashtrace", _REMEDY):
        from flashtrace import core

    ids = token_ids.to(model.device)[None]
    geometry = core.extract_model_metadata(model)
    attention = model.config._attn_implementation
    cache, hooks = core.attach_hooks(geometry.layers, model.dtype)
    try:
        model.set_attn_implementation("eager")
        with torch.inference_mode(), evaluating(model):
            attentions = model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                use_cache=False,
                output_attentions=True,
            ).attentions
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(attention)
    return {
        "cache": cache,
        "attentions": attentions,
        "weight_pack": core.build_weight_pack(geometry, model.dtype),
        "params": core.IFRParameters(
            n_layers=geometry.n_layers,
            n_heads_q=geometry.n_heads_q,
            n_kv_heads=geometry.n_kv_heads,
            head_dim=geometry.head_dim,
            group_size=geometry.group_size,
            d_model=geometry.d_model,
            sequence_length=len(token_ids),
            model_dtype=model.dtype,
            chunk_tokens=128,
            sink_chunk_tokens=32,
        ),
        "rotary_emb": geometry.rotary_emb,
    }


def _flashtrace(tracer: Tracer, task: Task, i: int) -> Tensor:
    """FlashTrace's span aggregate, where the span is the likeliest right token behind the prompt.

    One token without reasoning leaves no further hop to make.
    """
    with needing("the method FlashTrace", "flashtrace", _REMEDY):
        from flashtrace import core

    ids = torch.tensor(_with_answer(tracer, task, i))
    given, last = flashtrace_arguments(tracer.decoder.model, ids), len(ids) - 1
    with torch.inference_mode():
        found = core.compute_ifr_sentence_aggregate(sink_start=last, sink_end=last, **given)
    return torch.as_tensor(found.token_importance_total)[:last].float().cpu()


METHODS: dict[str, Attribution] = {
    "routes": _routes,
    "routes, answer appended": _routes_of_answer,
    "direct reads": _reads,
    "direct reads, answer appended": _reads_of_answer,
    "FlashTrace": _flashtrace,
    "attention rollout": _rollout,
    "gradient x input": _gradient_x_input,
    "integrated gradients": _integrated_gradients,
}


_REMEDY = "pip install 'ifr-fast[circuits]'"
_NEEDS = {
    "FlashTrace": "flashtrace",
    "gradient x input": "captum",
    "integrated gradients": "captum",
}


def missing(tracer: Tracer) -> dict[str, str]:
    """The methods that cannot run here, each with the reason."""
    found = {
        name: f"the package {package} is not installed"
        for name, package in _NEEDS.items()
        if find_spec(package) is None
    }
    if "FlashTrace" not in found and not _is_llama_style(tracer.decoder):
        found["FlashTrace"] = "it supports only models with Llama's layout"
    return found


def available(tracer: Tracer) -> list[str]:
    """The methods that can run here."""
    lacking = missing(tracer)
    return [name for name in METHODS if name not in lacking]


def _is_llama_style(decoder: Decoder) -> bool:
    """True if the model has the modules that FlashTrace looks up by name."""
    names = {name for name, _ in decoder.model.named_modules()}
    wanted = ("input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "self_attn.o_proj")
    return all(f"model.layers.0.{name}" in names for name in (*wanted, "mlp"))
