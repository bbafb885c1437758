"""Routes compared with activation patching: tasks, interventions, and how far the two agree.

    task = circuits.ioi(tracer.tokenizer, 50)
    routes = circuits.contrastive(tracer, task)  # differences of importances, [P, L, H]
    effects = circuits.patch(tracer.decoder, task)  # the effect of patching each head, [P, L, H]
    gap = effects.prompt - effects.against  # the difference that patching can restore, [P]
    circuits.agreement(routes.heads.flatten(1), effects.heads.flatten(1), least=0.02, gap=gap)

docs/circuits.md explains the measurements.
"""

from .agreement import (
    Agreement,
    Interval,
    agreement,
    agreement_with,
    auc,
    mean_interval,
    precision_at,
    rank_correlation,
    roc_curve,
)
from .contrast import Components, components, contrastive, membership
from .deletion import Curves
from .faithfulness import (
    Selection,
    Survival,
    attention_selection,
    attention_weights,
    random_selection,
    selected,
    survival,
)
from .inputs import token_faithfulness
from .interventions import Observed, intervening, observe, restarting, run
from .patching import (
    Activations,
    Effects,
    ablate,
    ablated_logits,
    mean_activations,
    patch,
    zero_activations,
)
from .published import published_circuit
from .report import Settings, make_report
from .tasks import Prompt, Task, greater_than, ioi

__all__ = [
    "Activations",
    "Agreement",
    "Components",
    "Curves",
    "Effects",
    "Interval",
    "Observed",
    "Prompt",
    "Selection",
    "Settings",
    "Survival",
    "Task",
    "ablate",
    "ablated_logits",
    "agreement",
    "agreement_with",
    "attention_selection",
    "attention_weights",
    "auc",
    "components",
    "contrastive",
    "greater_than",
    "intervening",
    "ioi",
    "make_report",
    "mean_activations",
    "mean_interval",
    "membership",
    "observe",
    "patch",
    "precision_at",
    "published_circuit",
    "random_selection",
    "rank_correlation",
    "restarting",
    "roc_curve",
    "run",
    "selected",
    "survival",
    "token_faithfulness",
    "zero_activations",
]
