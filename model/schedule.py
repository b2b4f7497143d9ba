"""The learning rate: a tenth on each plateau, as the paper had it by hand."""

from __future__ import annotations

import dataclasses
import math

PAPER_REDUCTIONS = 3  # section 5: "reduced three times prior to termination"
PAPER_FACTOR = 0.1  # section 5: "divide the learning rate by 10"


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

    def __post_init__(self) -> None:
        if not math.isfinite(self.lr) or self.lr < 0:
            raise ValueError(f"the rate of the next epoch is {self.lr}; it must be a finite number, not below 0")

    def after(self, epoch: int, metric: float, patience: int, name: str = "top1_error") -> Plateau:
        """The state after an epoch's validation.

        As torch's ReduceLROnPlateau(threshold=0, patience=patience - 1): any strict improvement counts, and the
        `patience`-th epoch in a row without one divides the rate by ten.

        Args:
            epoch: which, from 1; for the reason.
            metric: a fraction (top1_error) or nats (loss); lower is better.
            patience: epochs without an improvement before the rate drops.
            name: what the metric is: top1_error or loss.
        """
        if self.best is None or metric < self.best:
            return dataclasses.replace(self, best=metric, bad_epochs=0, reason="")
        bad = self.bad_epochs + 1
        if bad < patience:
            return dataclasses.replace(self, bad_epochs=bad, reason="")
        span = f"{bad} epoch{'s' if bad > 1 else ''}"
        what = "error" if name == "top1_error" else "loss"
        cause = f"epoch {epoch}: {what} {_read(metric, name)} did not improve on {_read(self.best, name)} for {span}"
        if self.reductions == PAPER_REDUCTIONS:
            reason = f"{cause}: stopping, the rate was reduced {PAPER_REDUCTIONS} times"
            return dataclasses.replace(self, bad_epochs=0, stopped=True, reason=reason)
        lr = self.lr * PAPER_FACTOR
        return dataclasses.replace(
            self, lr=lr, bad_epochs=0, reductions=self.reductions + 1, reason=f"{cause}: rate {self.lr:g} -> {lr:g}"
        )


def _read(metric: float, name: str) -> str:
    return f"{metric:.1%}" if name == "top1_error" else f"{metric:.4f}"
