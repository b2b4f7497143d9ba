"""Where a training stands between two steps."""

from __future__ import annotations

import dataclasses
from typing import Any

from model.metrics import Score
from model.recipe import Recipe
from model.schedule import Plateau


@dataclasses.dataclass
class Progress:
    """All that a checkpoint holds besides network and optimizer."""

    schedule: Plateau
    epoch: int = 0
    """Epochs completed."""
    step: int = 0
    """Steps completed of the epoch under way."""
    sums: list[float] = dataclasses.field(default_factory=lambda: [0.0] * 4)
    """Images, loss, top-1 and top-5 errors of the epoch under way, summed over all workers."""
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """One row an epoch."""
    rate: float | None = None
    """The learning rate of the last step; None before the first."""
    flat_steps: int = 0
    """For how many steps the loss has been that of guessing."""
    finished: bool = False

    def close_epoch(self, recipe: Recipe, train: Score, validation: Score) -> dict[str, Any]:
        """Takes the schedule's decision at an epoch's end; returns the epoch's row, which is added to the history."""
        epoch = self.epoch + 1
        if recipe.schedule == "plateau":
            metric = validation.top1_error if recipe.plateau_metric == "top1_error" else validation.loss
            self.schedule = self.schedule.after(epoch, metric, recipe.patience, recipe.plateau_metric)
        row: dict[str, Any] = {
            "epoch": epoch,
            "lr": self.rate,
            "train_loss": train.loss,
            "train_error": train.top1_error,
            "val_loss": validation.loss,
            "top1_error": validation.top1_error,
            "top5_error": validation.top5_error,
            "val_images": validation.images,
            "images": train.images,
            "reason": self.schedule.reason,
        }
        self.history.append(row)
        self.epoch, self.step, self.sums = epoch, 0, [0.0] * 4
        self.finished = self.schedule.stopped or epoch >= recipe.epochs
        return row

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Progress:
        """What `to_json` gave.

        Raises:
            TypeError, ValueError, KeyError: for anything else.
        """
        fields = dict(value)
        fields.pop("best_error", None)  # Of older checkpoints
        progress = cls(schedule=Plateau(**fields.pop("schedule")), **fields)
        if not all(type(number) is int and number >= 0 for number in (progress.epoch, progress.step)):
            raise ValueError(f"training cannot be after epoch {progress.epoch!r}, step {progress.step!r}")
        return progress
