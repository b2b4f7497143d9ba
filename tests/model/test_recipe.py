"""The recipes' numbers, the optimizer against the paper's update, the schedule against torch's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from model.alexnet import AlexNet
from model.optimizer import make_optimizer, set_rate
from model.recipe import RECIPES, Recipe
from model.schedule import Plateau

Update = Callable[[str, np.ndarray, np.ndarray, np.ndarray, float], tuple[np.ndarray, np.ndarray]]


def follow(recipe: Recipe, rates: list[float], update: Update) -> None:
    """Trains a layer in float64, whose biases start at 0, at these rates: each step must be the formula's.

    Args:
        update: (parameter's name, w, v, gradient, rate) -> the next w and v.
    """
    torch.manual_seed(0)
    layer = nn.Linear(5, 4).double()
    nn.init.zeros_(layer.bias)
    optimizer = make_optimizer(layer, recipe)
    w = {name: p.detach().numpy().copy() for name, p in layer.named_parameters()}
    v = {name: np.zeros_like(value) for name, value in w.items()}
    for rate in rates:
        set_rate(optimizer, rate)
        optimizer.zero_grad()
        (layer(torch.randn(8, 5).double()) - torch.randn(8, 4)).square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None
            w[name], v[name] = update(name, w[name], v[name], parameter.grad.numpy().copy(), rate)
        optimizer.step()
        for name, parameter in layer.named_parameters():
            np.testing.assert_allclose(parameter.detach().numpy(), w[name], rtol=1e-9, atol=1e-12)


@pytest.mark.paper
@pytest.mark.parametrize("biases", ["paper", "caffe"])
def test_the_update_is_the_papers_over_changes_of_the_rate(biases: str) -> None:
    def update(name: str, w: np.ndarray, v: np.ndarray, g: np.ndarray, lr: float) -> tuple[np.ndarray, np.ndarray]:
        rate, decay = (2 * lr, 0.0) if (biases, name) == ("caffe", "bias") else (lr, 0.0005)
        v = 0.9 * v - decay * rate * w - rate * g  # section 5
        return w + v, v

    follow(Recipe(biases=biases), [0.01] * 3 + [0.001] * 3 + [0.005] * 2, update)


def test_lars_is_the_published_formula() -> None:
    def update(name: str, w: np.ndarray, v: np.ndarray, g: np.ndarray, lr: float) -> tuple[np.ndarray, np.ndarray]:
        size = np.linalg.norm(w)
        local = 0.001 * size / (np.linalg.norm(g) + 0.0005 * size) if size > 0 else 1.0
        v = 0.9 * v + lr * local * (g + 0.0005 * w)
        return w - v, v

    follow(Recipe(optimizer="lars", lr=10.0), [0.1, 0.2, 10.0, 10.0, 1.0], update)


def test_rates_of_the_schedules() -> None:
    recipe = Recipe(lr=10.0, epochs=4, schedule="poly", power=2.0, warm_up_epochs=1)
    found = [recipe.rate(0.123, epoch, step, 5) for epoch in range(4) for step in range(5)]
    expected = [10.0 * min(1.0, (t + 1) / 5) * (1 - t / 20) ** 2 for t in range(20)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert Recipe().rate(0.001, 7, 3, 5) == 0.001


@pytest.mark.paper
def test_the_papers_numbers() -> None:
    paper = RECIPES["paper"]
    assert (paper.batch_size, paper.epochs, paper.lr, paper.momentum, paper.weight_decay) == (128, 90, 0.01, 0.9, 5e-4)
    assert (paper.hidden_bias, paper.dropout, paper.schedule, paper.warm_up_epochs) == (1.0, 0.5, "plateau", 0)
    assert (paper.normalization, paper.initialization, paper.color) == ("lrn", "gaussian", "eigenvalue")
    assert RECIPES["default"] == dataclasses.replace(paper, hidden_bias=0.1)


@pytest.mark.parametrize("name", ["large-batch", "batchnorm"])
def test_a_recipe_trains_a_step(name: str) -> None:
    recipe = RECIPES[name]
    network = AlexNet(3, recipe.groups, recipe.dropout, recipe.normalization)
    network.initialize(0, recipe.hidden_bias, recipe.initialization)
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    optimizer = make_optimizer(network, recipe)
    set_rate(optimizer, recipe.rate(recipe.lr, 0, 0, 5))
    images = 60 * torch.randn(4, 3, 227, 227, generator=torch.Generator().manual_seed(0))
    nn.functional.cross_entropy(network(images), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in network.parameters())
    assert all(not torch.equal(before[n], p) for n, p in network.named_parameters() if n.endswith("weight"))


@pytest.mark.paper
@pytest.mark.parametrize("patience", [1, 3])
def test_the_schedule_agrees_with_torchs(patience: int) -> None:
    """And survives a checkpoint at any epoch."""
    for seed in range(10):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.01)
        theirs = ReduceLROnPlateau(optimizer, factor=0.1, patience=patience - 1, threshold=0.0)
        ours = Plateau(0.01)
        noise = np.random.default_rng(seed).normal(size=300)
        # Rounded, so that equal errors occur.
        errors = np.round(0.4 + 0.5 * np.exp(-np.arange(300) / 4) + 0.02 * noise, 2)
        for epoch, metric in enumerate(errors.tolist(), start=1):
            ours = Plateau(**json.loads(json.dumps(dataclasses.asdict(ours.after(epoch, metric, patience)))))
            if ours.stopped:
                break
            theirs.step(metric)
            assert ours.lr == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        assert ours.stopped
        assert ours.reductions == 3
        assert ours.lr == pytest.approx(1e-5)


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"lr": float("nan")}, {"dropout": 1.0}, {"plateau_metric": "top5"}, {"seed": -1}]
)
def test_impossible_recipes_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)).replace("_", ".")):
        Recipe(**wrong)  # type: ignore[arg-type]
