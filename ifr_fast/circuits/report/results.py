"""Settings and results of a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .. import cost as costs
from ..agreement import Agreement
from ..contrast import Components
from ..deletion import Curves
from ..faithfulness import THRESHOLDS, Survival
from ..patching import Effects
from ..published import Circuit
from ..tasks import TASKS, Task

BY_SIZE = ", size"  # such a method ranks by the size of the mean score, whatever its sign
HEAD_METHODS = (
    "contrastive routes",
    "contrastive routes" + BY_SIZE,
    "contrastive routes, frequency",
    "plain routes",
    "plain routes, frequency",
    "attention",
    "contrastive attention",
)
INPUTS = {"all tokens": False, "last token kept": True}  # name -> True if the last token stays


@dataclass(frozen=True)
class Settings:
    """The measurements to make, and their sizes."""

    task: str = "ioi"
    n_prompts: int = 50
    seed: int = 0
    threshold: float = 0.01  # threshold of the routes compared with patching
    least: float = 0.02  # smallest effect of a positive head, in shares of the difference
    patch_prompts: int | None = None  # number of prompts to patch; None: all
    keep_prompts: int | None = None  # number of prompts to ablate; None: all that are patched
    thresholds: tuple[float, ...] = THRESHOLDS  # thresholds of kept graphs
    remove_thresholds: tuple[float, ...] = (0.01, 0.04)  # thresholds of removed graphs
    draws: int = 20  # random graphs for each route graph
    cost_prompts: int = 5  # patched position by position
    input_prompts: int = 20  # prompts whose tokens are deleted

    def check(self) -> None:
        """Raises ValueError for settings that cannot be measured."""
        if self.task not in TASKS:
            raise ValueError(f"--task: expected one of {', '.join(TASKS)}, got {self.task!r}")
        counts = ("n_prompts", "draws", "cost_prompts", "input_prompts", "patch_prompts",
                 "keep_prompts")  # fmt: skip
        for name in counts:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.least < 1:
            raise ValueError(f"least: expected a number between 0 and 1, got {self.least}")


class Results(NamedTuple):
    """All numbers of a report."""

    settings: Settings
    task: Task
    exact: dict[str, float]  # largest change of a logit
    cost: list[costs.Cost]
    scores: dict[str, Tensor]  # method -> [P, L * H]
    effects: dict[str, Effects]  # direction -> effects
    agreements: dict[str, dict[str, Agreement]]  # direction or "published" -> method
    sensitivity: dict[float, dict[str, float]]  # AUC against denoising, by `least`
    kept: Survival
    removed: Survival
    inputs: dict[str, dict[str, list[Curves]]]  # name in INPUTS -> method -> curves
    ffn: Components  # contrastive routes
    published: Circuit | None


def ranking(name: str, scores: Tensor) -> Tensor:
    """The numbers [N] by which a method ranks heads."""
    return scores.mean(0).abs() if name.endswith(BY_SIZE) else scores.mean(0)


def shares(effects: Effects) -> Tensor:
    """Effects [P, L, H] in shares of the mean difference that patching could restore or remove."""
    return effects.heads / effects.gap
