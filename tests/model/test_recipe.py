"""The optimizer against the paper's update, the schedule against torch's."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from model.optimizer import make_optimizer, set_rate
from model.recipe import RECIPES, Recipe
from model.schedule import Plateau


def update(layer: nn.Linear, optimizer: torch.optim.SGD, seed: int) -> dict[str, np.ndarray]:
    """One step on random data; the gradients that it used, float64 by parameter name."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(8, 5, generator=generator), torch.randn(8, 4, generator=generator)
    optimizer.zero_grad()
    (layer(x.to(layer.weight.dtype)) - y).square().sum().backward()
    gradients = {name: p.grad.double().numpy().copy() for name, p in layer.named_parameters() if p.grad is not None}
    optimizer.step()
    return gradients


@pytest.mark.paper
@pytest.mark.parametrize("biases", ["paper", "caffe"])
def test_the_update_is_the_papers_over_changes_of_the_rate(biases: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 4).double()
    optimizer = make_optimizer(layer, Recipe(biases=biases))
    w = {name: p.detach().numpy().copy() for name, p in layer.named_parameters()}
    v = {name: np.zeros_like(value) for name, value in w.items()}
    for step, lr in enumerate([0.01] * 3 + [0.001] * 3 + [0.005] * 2):
        set_rate(optimizer, lr)
        gradients = update(layer, optimizer, step)
        for name, gradient in gradients.items():
            caffes = biases == "caffe" and name == "bias"
            rate, decay = (2 * lr, 0.0) if caffes else (lr, 0.0005)
            v[name] = 0.9 * v[name] - decay * rate * w[name] - rate * gradient  # section 5
            w[name] = w[name] + v[name]
        for name, parameter in layer.named_parameters():
            np.testing.assert_allclose(parameter.detach().numpy(), w[name], rtol=1e-10)


def test_lars_is_the_published_formula() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 4).double()
    nn.init.zeros_(layer.bias)
    recipe = Recipe(optimizer="lars", lr=10.0)
    optimizer = make_optimizer(layer, recipe)
    w = {name: p.detach().numpy().copy() for name, p in layer.named_parameters()}
    v = {name: np.zeros_like(value) for name, value in w.items()}
    for step, lr in enumerate([0.1, 0.2, 10.0, 10.0, 1.0]):
        set_rate(optimizer, lr)
        for name, gradient in update(layer, optimizer, step).items():
            size, slope = np.linalg.norm(w[name]), np.linalg.norm(gradient)
            local = 0.001 * size / (slope + 0.0005 * size) if size > 0 else 1.0
            v[name] = 0.9 * v[name] + lr * local * (gradient + 0.0005 * w[name])
            w[name] = w[name] - v[name]
        for name, parameter in layer.named_parameters():
            np.testing.assert_allclose(parameter.detach().numpy(), w[name], rtol=1e-9, atol=1e-12)


def test_rates_of_the_schedules() -> None:
    recipe = Recipe(lr=10.0, epochs=4, schedule="poly", power=2.0, warm_up_epochs=1)
    found = [recipe.rate(0.123, epoch, step, 5) for epoch in range(4) for step in range(5)]
    expected = [10.0 * min(1.0, (t + 1) / 5) * (1 - t / 20) ** 2 for t in range(20)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert Recipe().rate(0.001, 7, 3, 5) == 0.001


def test_the_named_recipes_differ_in_one_number() -> None:
    paper, default = (dataclasses.asdict(RECIPES[name]) for name in ("paper", "default"))
    assert {name for name in paper if paper[name] != default[name]} == {"hidden_bias"}


def metrics(seed: int, count: int) -> list[float]:
    generator = np.random.default_rng(seed)
    return (0.4 + 0.5 * np.exp(-np.arange(count) / 4) + 0.02 * generator.normal(size=count)).tolist()


@pytest.mark.paper
@pytest.mark.parametrize("patience", [1, 2, 3, 5])
def test_the_schedule_agrees_with_torchs(patience: int) -> None:
    """And survives a checkpoint at any epoch."""
    for seed in range(40):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.01)
        theirs = ReduceLROnPlateau(optimizer, factor=0.1, patience=patience - 1, threshold=0.0)
        ours = Plateau(0.01)
        # Rounded, so that equal metrics occur.
        for epoch, metric in enumerate(np.round(metrics(seed, 300), 2).tolist(), start=1):
            ours = Plateau(**json.loads(json.dumps(ours.after(epoch, metric, patience).to_json())))
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
    assert reasons[2] == "epoch 3: error 60.0 % did not improve on 50.0 % for 2 epochs: rate 0.01 -> 0.001"
    assert [bool(reason) for reason in reasons] == [False, False, True, False, True, False, True, False]
    assert "stopping" in state.after(9, 0.6, patience=2).reason


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"lr": float("nan")}, {"dropout": 1.0}, {"plateau_metric": "top5"}, {"seed": -1}]
)
def test_impossible_recipes_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)).replace("_", ".")):
        Recipe(**wrong)  # type: ignore[arg-type]
