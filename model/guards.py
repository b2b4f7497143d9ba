"""What can go wrong with a loss: no number, a step longer than the weights, or nothing learned at all."""

from __future__ import annotations

import dataclasses
import math

FLAT_MARGIN = 0.05  # Nats around ln(classes). Guessing scatters by less over a few thousand images.
FLAT_STEPS = 500  # And at least an epoch: on ImageNet, AlexNet stays near ln(1000) for one or two thousand steps.


class DivergedError(ValueError):
    """The loss or the gradient is no longer a finite number, or a step was longer than all the weights."""


@dataclasses.dataclass(frozen=True)
class Window:
    """What happened in some successive steps, the same on every worker."""

    steps: int
    loss: float
    """Mean training loss in nats."""
    gradient_norm: float
    """The largest norm of the whole gradient, as the update used it."""
    weight_norm: float
    """Of all parameters, before the first of these steps."""
    rate: float
    """The highest learning rate."""
    classes: int


def diverged(cause: str, epoch: int, first: int, last: int, rate: float) -> DivergedError:
    """The error that names where training diverged, steps `first` to `last` of an epoch, and its cure."""
    return DivergedError(
        f"{cause} in epoch {epoch}, steps {first} to {last}, at rate {rate:g}: start again with a lower --lr, under "
        "another --name"
    )


def divergence(window: Window) -> str | None:
    """Why training must stop, as a clause, or None.

    A step is at most about rate * gradient_norm / (1 - momentum) long; one that is longer than the weights themselves
    leaves nothing of what they held.
    """
    if not math.isfinite(window.loss):
        return f"the loss became {window.loss}"
    if not math.isfinite(window.gradient_norm) or not math.isfinite(window.weight_norm):
        return f"the gradient's norm became {window.gradient_norm} and the weights' {window.weight_norm}"
    if window.rate * window.gradient_norm > window.weight_norm:
        return (
            f"the gradient exploded: its norm became {window.gradient_norm:.3g}, so that one step was longer than all "
            f"weights together ({window.weight_norm:.3g})"
        )
    return None


def flat_steps(before: int, window: Window) -> int:
    """For how many steps the loss has now been that of guessing, ln(classes), if it was for `before`."""
    return before + window.steps if abs(window.loss - math.log(window.classes)) < FLAT_MARGIN else 0


def dead_network(before: int, now: int, steps_per_epoch: int, classes: int) -> str | None:
    """A warning, when the steps at the loss of guessing have just become too many; else None."""
    limit = max(FLAT_STEPS, steps_per_epoch)
    if not before < limit <= now:
        return None
    return (
        f"warning: for {now} steps the loss has been that of guessing, ln({classes}) = {math.log(classes):.3f}: the "
        "network may be dead. Likely cures: hidden biases of 0.1 (--hidden-bias 0.1, the default recipe) instead of 1, "
        "a lower --lr or some --warm-up-epochs, --recipe batchnorm; or the labels do not belong to the images "
        "(python jobs/verify_shards.py --data OUT --decode)"
    )
