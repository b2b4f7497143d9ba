"""How the paper trains (section 5): stochastic gradient descent, and a rate divided by ten on each plateau."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import nn

from model.alexnet import PAPER_DROPOUT, PAPER_HIDDEN_BIAS

PAPER_REDUCTIONS = 3  # section 5: "reduced three times prior to termination"
PAPER_FACTOR = 0.1  # section 5: "divide the learning rate by 10"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides what is learnt, but for the data; the defaults are the paper's."""

    batch_size: int = 128
    """Images per step over all workers (section 5)."""
    epochs: int = 90
    """At most this many; "roughly 90 cycles" (section 5)."""
    lr: float = 0.01
    """Learning rate at the start (section 5)."""
    momentum: float = 0.9
    """Section 5."""
    weight_decay: float = 0.0005
    """Section 5; on every weight and bias, as its update rule is written."""
    hidden_bias: float = PAPER_HIDDEN_BIAS
    """Initial bias of conv2, conv4, conv5, fc6 and fc7 (section 5)."""
    dropout: float = PAPER_DROPOUT
    """On the outputs of fc6 and fc7 (section 4.2)."""
    groups: int = 1
    """1: one tower; 2: the paper's two GPUs (section 3.2)."""
    colour: str = "eigenvalue"
    """How the colour shift scales (section 4.1): eigenvalue, std (the 2012 source's) or none."""
    plateau_metric: str = "top1_error"
    """What must improve on the validation set: top1_error (section 5: "the validation error rate") or loss."""
    patience: int = 3
    """Epochs without an improvement before the rate drops. The paper judged by hand and gives no number."""
    seed: int = 0
    """Of the initial weights, the plan and dropout."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("lr", "momentum", "weight_decay", "hidden_bias"):
            if not math.isfinite(getattr(self, name)) or getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a finite number, not below 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must lie in [0, 1)")
        if self.plateau_metric not in ("top1_error", "loss"):
            raise ValueError(f"the plateau metric is {self.plateau_metric!r}; it must be top1_error or loss")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"the seed is {self.seed}; it must lie in [0, 2^63)")


def make_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """The paper's update. torch keeps the rate outside the momentum, which differs only for some steps after a drop."""
    return torch.optim.SGD(
        network.parameters(), recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=True
    )


@dataclasses.dataclass(frozen=True)
class Plateau:
    """The schedule's state: an immutable value, so that a checkpoint holds all of it."""

    lr: float
    """The rate of the next epoch."""
    best: float | None = None
    """The lowest metric so far."""
    bad_epochs: int = 0
    """Epochs since it improved or the rate dropped."""
    reductions: int = 0
    """How often the rate was divided."""
    stopped: bool = False
    """A further plateau came after the last reduction."""
    reason: str = ""
    """What the last epoch decided, for a person."""

    def after(self, epoch: int, metric: float, patience: int) -> Plateau:
        """The state after an epoch's validation.

        As torch's ReduceLROnPlateau(threshold=0, patience=patience - 1): any strict improvement counts, and the
        `patience`-th epoch in a row without one divides the rate by ten.
        """
        if self.best is None or metric < self.best:
            return dataclasses.replace(self, best=metric, bad_epochs=0, reason="")
        bad = self.bad_epochs + 1
        if bad < patience:
            return dataclasses.replace(self, bad_epochs=bad, reason="")
        cause = f"epoch {epoch}: {metric:.4f} did not improve on {self.best:.4f} for {bad} epoch(s)"
        if self.reductions == PAPER_REDUCTIONS:
            return dataclasses.replace(self, bad_epochs=0, stopped=True, reason=f"{cause}: stopping")
        lr = self.lr * PAPER_FACTOR
        return dataclasses.replace(
            self, lr=lr, bad_epochs=0, reductions=self.reductions + 1, reason=f"{cause}: rate {self.lr:g} -> {lr:g}"
        )

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


RECIPES = {
    # BVLC's Caffe reproduction starts the same layers at 0.1; see "Deviations from the paper" in the README for why.
    "default": Recipe(hidden_bias=0.1),
    "paper": Recipe(),
}
"""Complete, named configurations: the paper to the letter, and the smallest deviation from it that learns reliably."""
