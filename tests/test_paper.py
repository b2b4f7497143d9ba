"""The paper's remaining claims, each against its own sentence; and that docs/paper.md names the marked tests."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from model.alexnet import AlexNet
from model.recipe import RECIPES, Recipe

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.paper
def test_dropout_halves_and_keeps_the_mean() -> None:
    # Section 4.2 halves outputs at test time; to double what is kept in training instead gives the same expectation.
    network = AlexNet(2)
    ones = torch.ones(200_000)
    kept = network.train().dropout(ones)
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert abs(float(kept.mean()) - 1.0) < 4 / np.sqrt(200_000)
    assert torch.equal(network.eval().dropout(ones), ones)


@pytest.mark.paper
def test_pooling_overlaps() -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 2, 13, 13)))
    found = AlexNet(2).pool(x).numpy()
    for row in range(6):
        for column in range(6):
            window = x[:, :, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3].numpy()
            np.testing.assert_array_equal(found[:, :, row, column], window.max(axis=(2, 3)))


@pytest.mark.paper
def test_the_papers_numbers() -> None:
    paper = RECIPES["paper"]
    assert (paper.batch_size, paper.epochs, paper.lr, paper.momentum, paper.weight_decay) == (128, 90, 0.01, 0.9, 5e-4)
    assert (paper.hidden_bias, paper.dropout, paper.schedule, paper.warm_up_epochs) == (1.0, 0.5, "plateau", 0)
    assert (paper.normalization, paper.initialization, paper.color) == ("lrn", "gaussian", "eigenvalue")


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_each_recipe_trains_a_step(name: str) -> None:
    from model.optimizer import make_optimizer, set_rate

    recipe: Recipe = RECIPES[name]
    network = AlexNet(3, recipe.groups, recipe.dropout, recipe.normalization)
    network.initialize(0, recipe.hidden_bias, recipe.initialization)
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    optimizer = make_optimizer(network, recipe)
    set_rate(optimizer, recipe.rate(recipe.lr, 0, 0, 5))
    images = 60 * torch.randn(4, 3, 227, 227, generator=torch.Generator().manual_seed(0))
    loss = torch.nn.functional.cross_entropy(network(images), torch.tensor([0, 1, 2, 0]))
    loss.backward()
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in network.parameters())
    assert all(not torch.equal(before[n], p) for n, p in network.named_parameters() if n.endswith("weight"))


def test_every_test_that_the_table_names_exists_and_is_marked() -> None:
    table = (ROOT / "docs" / "paper.md").read_text("utf-8")
    named = set(re.findall(r"`(test_\w+)\.py::(test_\w+)`", table))
    assert len(named) >= 12
    marked = {
        (path.stem, node.name)
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef) and "pytest.mark.paper" in map(ast.unparse, node.decorator_list)
    }
    assert named == marked
