"""Settings and results of a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ...arguments import (
    check_choice,
    check_count,
    check_fraction,
    check_number,
    check_seed,
    listed,
)
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
        check_choice("task", self.task, TASKS)
        check_seed("seed", self.seed)
        counts = ("n_prompts", "draws", "cost_prompts", "input_prompts", "patch_prompts",
                 "keep_prompts")  # fmt: skip
        for name in counts:
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_fraction("threshold", self.threshold)
        for name in ("thresholds", "remove_thresholds"):
            if not [check_fraction(name, x) for x in listed(name, getattr(self, name))]:
                raise ValueError(f"{name}: is empty; expected at least one")
        between = check_number("least", self.least, "a number between 0 and 1", above=0, high=1)
        if between == 1:
            raise ValueError("least: expected a number between 0 and 1, got 1")


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
