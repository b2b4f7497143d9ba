"""The optimiser against the paper's update, the schedule against torch's."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from model.optimizer import make_optimizer
from model.recipe import RECIPES, Recipe
from model.schedule import Plateau


def test_the_update_is_the_papers() -> None:
    recipe = Recipe()
    layer = nn.Linear(5, 4)
    optimizer = make_optimizer(layer, recipe)
    w = layer.weight.detach().double().numpy().copy()
    v = np.zeros_like(w)
    x, y = torch.randn(8, 5), torch.randn(8, 4)
    for _ in range(6):
        optimizer.zero_grad()
        (layer(x) - y).square().sum().backward()
        assert layer.weight.grad is not None
        gradient = layer.weight.grad.double().numpy()
        optimizer.step()
        v = 0.9 * v - 0.0005 * 0.01 * w - 0.01 * gradient  # section 5
        w = w + v
        np.testing.assert_allclose(layer.weight.detach().numpy(), w, rtol=1e-4, atol=1e-6)
        w = layer.weight.detach().double().numpy().copy()


def test_the_named_recipes_differ_in_one_number() -> None:
    paper, default = (dataclasses.asdict(RECIPES[name]) for name in ("paper", "default"))
    assert {name for name in paper if paper[name] != default[name]} == {"hidden_bias"}
    assert (paper["batch_size"], paper["epochs"], paper["lr"], paper["hidden_bias"]) == (128, 90, 0.01, 1.0)


def metrics(seed: int, count: int) -> list[float]:
    generator = np.random.default_rng(seed)
    return (0.4 + 0.5 * np.exp(-np.arange(count) / 4) + 0.02 * generator.normal(size=count)).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_the_schedule_agrees_with_torchs(seed: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.01)
    theirs = ReduceLROnPlateau(optimizer, factor=0.1, patience=2, threshold=0.0)
    ours = Plateau(0.01)
    for epoch, metric in enumerate(metrics(seed, 60), start=1):
        ours = ours.after(epoch, metric, patience=3)
        if ours.stopped:
            break
        theirs.step(metric)
        assert ours.lr == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
    assert ours.stopped
    assert ours.reductions == 3
    assert ours.lr == pytest.approx(1e-5)


def test_it_says_why() -> None:
    state = Plateau(0.01)
    reasons = []
    for epoch, metric in enumerate([0.5, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6], start=1):
        state = state.after(epoch, metric, patience=2)
        reasons.append(state.reason)
    assert reasons[2] == "epoch 3: 0.6000 did not improve on 0.5000 for 2 epoch(s): rate 0.01 -> 0.001"
    assert [bool(reason) for reason in reasons] == [False, False, True, False, True, False, True, False]
    assert "stopping" in state.after(9, 0.6, patience=2).reason


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"lr": float("nan")}, {"dropout": 1.0}, {"plateau_metric": "top5"}, {"seed": -1}]
)
def test_impossible_recipes_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)).replace("_", ".")):
        Recipe(**wrong)  # type: ignore[arg-type]
