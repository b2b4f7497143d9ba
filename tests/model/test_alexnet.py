"""The network against the paper's table and sentences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.alexnet import AlexNet

BIASES = {"conv1": 0, "conv2": 1, "conv3": 0, "conv4": 1, "conv5": 1, "fc6": 1, "fc7": 1, "fc8": 0}


def without_values(classes: int, groups: int = 1) -> AlexNet:
    """A network that takes neither memory nor time to make."""
    with torch.device("meta"):
        return AlexNet(classes, groups)


@pytest.mark.paper
@pytest.mark.parametrize(("groups", "parameters"), [(1, 62_378_344), (2, 60_965_224)])
def test_parameters_at_1000_classes(groups: int, parameters: int) -> None:
    assert sum(p.numel() for p in without_values(1000, groups).parameters()) == parameters


@pytest.mark.paper
def test_layer_shapes() -> None:
    network = without_values(1000).eval()
    shapes: dict[nn.Module, tuple[int, ...]] = {}

    def hook(layer: nn.Module, _: object, output: Tensor) -> None:
        shapes[layer] = tuple(output.shape[1:])

    for layer in network.children():
        layer.register_forward_hook(hook)
    with torch.no_grad():
        assert network.features(torch.zeros(1, 3, 227, 227, device="meta")).shape == (1, 256, 6, 6)
        network(torch.zeros(1, 3, 227, 227, device="meta"))
    assert {name: shapes[layer] for name, layer in network.named_children() if name in BIASES} == {
        "conv1": (96, 55, 55),
        "conv2": (256, 27, 27),
        "conv3": (384, 13, 13),
        "conv4": (384, 13, 13),
        "conv5": (256, 13, 13),
        "fc6": (4096,),
        "fc7": (4096,),
        "fc8": (1000,),
    }


@pytest.mark.paper
def test_initial_values() -> None:
    network = AlexNet(10)
    network.initialize(seed=4, hidden_bias=1.0)
    for name, bias in BIASES.items():
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        assert layer.bias is not None
        assert layer.bias.unique().tolist() == [bias], name
        n = layer.weight.numel()
        assert abs(layer.weight.mean()) < 4 * 0.01 / np.sqrt(n), name
        assert abs(layer.weight.std() / 0.01 - 1) < 4 / np.sqrt(2 * n), name
    before = network.fc7.weight.clone()
    network.initialize(seed=5)
    assert not torch.equal(network.fc7.weight, before)
    network.initialize(seed=4)
    assert torch.equal(network.fc7.weight, before)


@pytest.mark.paper
def test_dropout_halves_and_keeps_the_mean() -> None:
    # Section 4.2 halves outputs at test time; to double what is kept in training instead gives the same expectation.
    network = without_values(2)
    ones = torch.ones(200_000)
    kept = network.train().dropout(ones)
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert abs(float(kept.mean()) - 1.0) < 4 / np.sqrt(200_000)
    assert torch.equal(network.eval().dropout(ones), ones)


@pytest.mark.paper
def test_pooling_overlaps() -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 2, 13, 13)))
    found = without_values(2).pool(x).numpy()
    for row in range(6):
        for column in range(6):
            window = x[:, :, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3].numpy()
            np.testing.assert_array_equal(found[:, :, row, column], window.max(axis=(2, 3)))


@pytest.mark.parametrize(("classes", "groups"), [(1, 1), (10, 3)])
def test_impossible_networks_are_refused(classes: int, groups: int) -> None:
    with pytest.raises(ValueError, match=r"groups is 3|1 class"):
        AlexNet(classes, groups)
