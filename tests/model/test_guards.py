"""A run that diverged stops before its checkpoint, and one that learns nothing is said to."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from model import guards
from model.guards import DivergedError, Window, diverged, divergence
from tests.model.test_training import RECIPE, Recorder, SmallData, make_trainer, places


@pytest.mark.parametrize(("loss", "gradient"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, 1e6)])
def test_a_loss_or_gradient_of_a_run_that_diverged_is_told(loss: float, gradient: float) -> None:
    sound = Window(steps=2, loss=1.0, gradient_norm=1.0, weight_norm=5.0, rate=0.05, classes=3)
    assert divergence(sound) is None
    assert divergence(dataclasses.replace(sound, loss=loss, gradient_norm=gradient)) is not None
    assert str(diverged("it fell", 1, 3, 4, 1e-5)) == (
        "it fell in epoch 1, steps 3 to 4, at rate 1e-05: start again with a lower --lr, under another --name"
    )


@pytest.mark.parametrize(
    ("factor", "cause"),
    [(math.nan, "the gradient's norm became nan"), (1e6, "the gradient exploded: its norm became")],
)
def test_a_bad_gradient_stops_the_run_before_its_checkpoint(tmp_path: Path, factor: float, cause: str) -> None:
    trainer, record = make_trainer(), Recorder(tmp_path)
    steps: list[int] = []

    def poison(*_: object) -> None:
        """Makes the gradients of the ninth step that many times as large."""
        steps.append(len(steps) + 1)
        for parameter in trainer.network.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(factor if steps[-1] == 9 else 1.0)

    trainer.optimizer.register_step_pre_hook(poison)
    # Two steps a window: the ninth step is the fourth of the second epoch.
    with pytest.raises(DivergedError, match=cause + r".* in epoch 2, steps 3 to 4, at rate 0\.05"):
        trainer.fit(SmallData(), record)
    assert places(record)[-1] == (1, 2)


def test_a_dead_network_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "FLAT_STEPS", 20)
    trainer = make_trainer(dataclasses.replace(RECIPE, epochs=6, patience=6))
    for parameter in trainer.network.parameters():
        nn.init.zeros_(parameter)
        parameter.register_hook(torch.zeros_like)
    record = Recorder(None)
    trainer.fit(SmallData(), record)
    (warning,) = record.warnings
    assert "for 20 steps" in warning
    assert "ln(3) = 1.099" in warning
