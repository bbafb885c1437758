"""A test of interventions: the largest change of a logit where none should change."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tracer import Tracer
from .interventions import observe, restarting, run
from .tasks import Task

_TEXTS = 4  # texts that are tried
_LAYERS = 10  # about so many layers are tried


@torch.inference_mode()
def exactness(tracer: Tracer, task: Task) -> dict[str, float]:
    """The largest change of any logit from the plain forward pass, by kind of intervention.

    None of these interventions should change a logit.
    """
    decoder = tracer.decoder
    seen = [observe(decoder, [text]) for text in task.texts[:_TEXTS]]
    names = ("nothing", "own activations, whole run", "own activations, restarted")
    worst = dict.fromkeys((*names, "own activations, restarted alone"), 0.0)
    step = max(1, decoder.n_layers // _LAYERS)
    of = torch.zeros(1, dtype=torch.int64)
    for one, text in zip(seen, task.texts, strict=False):
        plain = tracer.model(input_ids=torch.tensor([text], device=decoder.device)).logits[:, -1]

        def note(name: str, got: Tensor, plain: Tensor = plain) -> None:
            worst[name] = max(worst[name], float((got - plain).abs().max()))

        note("nothing", run(decoder, [text], heads=lambda _, z: z, ffn=lambda _, x: x))
        own = run(
            decoder,
            [text],
            heads=lambda layer, _, one=one: one.z[layer],  # type: ignore[misc]
            ffn=lambda layer, _, one=one: one.ffn[layer],  # type: ignore[misc]
        )
        note("own activations, whole run", own)
        with restarting(decoder):
            for layer in range(0, decoder.n_layers, step):
                for t in (0, one.n_tokens // 2, one.n_tokens - 1):
                    for paired, name in ((True, names[2]), (False, f"{names[2]} alone")):
                        span = (layer, of, t, t + 1)
                        z, ffn = one.z[layer][:, t : t + 1], one.ffn[layer][:, t : t + 1]
                        note(name, one.restart(*span, z=z, paired=paired))
                        note(name, one.restart(*span, ffn=ffn, paired=paired))
    return worst
