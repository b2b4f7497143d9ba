"""The network against the paper's table and float64 formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.alexnet import AlexNet, parameter_count
from model.lrn import LocalResponseNorm


@pytest.mark.paper
@pytest.mark.parametrize(("groups", "parameters"), [(1, 62_378_344), (2, 60_965_224)])
def test_parameters_at_1000_classes(groups: int, parameters: int) -> None:
    with torch.device("meta"):
        assert parameter_count(AlexNet(1000, groups)) == parameters


@pytest.mark.paper
def test_layer_shapes() -> None:
    network = AlexNet(1000).eval()
    shapes: dict[str, tuple[int, ...]] = {}

    def record(name: str) -> None:
        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            shapes[name] = tuple(output.shape[1:])

        getattr(network, name).register_forward_hook(hook)

    for name in ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"):
        record(name)
    with torch.no_grad():
        assert network.features(torch.zeros(1, 3, 227, 227)).shape == (1, 256, 6, 6)
        network(torch.zeros(1, 3, 227, 227))
    assert shapes == {
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
    layers = {name: layer for name, layer in network.named_children() if isinstance(layer, nn.Conv2d | nn.Linear)}
    biases = {name: layer.bias.unique().tolist() for name, layer in layers.items() if layer.bias is not None}
    ones, zeros = [1.0], [0.0]
    assert biases == {
        "conv1": zeros,
        "conv2": ones,
        "conv3": zeros,
        "conv4": ones,
        "conv5": ones,
        "fc6": ones,
        "fc7": ones,
        "fc8": zeros,
    }
    for name, layer in layers.items():
        n = layer.weight.numel()
        assert abs(layer.weight.mean()) < 4 * 0.01 / np.sqrt(n), name
        assert abs(layer.weight.std() / 0.01 - 1) < 4 / np.sqrt(2 * n), name
    again, other = AlexNet(10), AlexNet(10)
    again.initialize(seed=4)
    other.initialize(seed=5)
    assert torch.equal(again.fc7.weight, network.fc7.weight)
    assert not torch.equal(other.fc7.weight, network.fc7.weight)


@pytest.mark.parametrize(("classes", "groups"), [(1, 1), (10, 3)])
def test_impossible_networks_are_refused(classes: int, groups: int) -> None:
    with pytest.raises(ValueError, match=r"groups is 3|1 class"):
        AlexNet(classes, groups)


def paper_lrn(a: NDArray[np.float64], k: float, n: int, alpha: float, beta: float) -> NDArray[np.float64]:
    """Section 3.3, term by term."""
    b = np.empty_like(a)
    maps = a.shape[1]
    for i in range(maps):
        low, high = max(0, i - n // 2), min(maps - 1, i + n // 2)
        b[:, i] = a[:, i] / (k + alpha * sum(a[:, j] ** 2 for j in range(low, high + 1))) ** beta
    return b


@pytest.fixture(params=["image by image", "whole"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """LRN as on a CPU, and as in an exported graph."""
    if request.param == "whole":
        monkeypatch.setattr("model.lrn._in_parts", lambda x: False)


@pytest.mark.paper
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_lrn_is_the_papers_formula(layout: torch.memory_format) -> None:
    a = np.random.default_rng(0).normal(0, 50, (2, 12, 5, 7))
    found = LocalResponseNorm(12).double()(torch.from_numpy(a).to(memory_format=layout))
    np.testing.assert_allclose(found.numpy(), paper_lrn(a, 2.0, 5, 1e-4, 0.75), rtol=1e-12)
    found = LocalResponseNorm(12)(torch.from_numpy(a).float().to(memory_format=layout))
    np.testing.assert_allclose(found.numpy(), paper_lrn(a, 2.0, 5, 1e-4, 0.75), rtol=2e-6)


@pytest.mark.usefixtures("way")
def test_torchs_lrn_agrees_when_its_alpha_is_n_times_ours() -> None:
    a = torch.randn(2, 96, 9, 9, dtype=torch.float64) * 40
    ours, theirs = a.clone().requires_grad_(), a.clone().requires_grad_()
    LocalResponseNorm(96).double()(ours).square().sum().backward()
    nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)(theirs).square().sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("beta", [0.75, 0.5])
def test_lrn_backward_against_differences(beta: float) -> None:
    norm = LocalResponseNorm(6, alpha=0.3, beta=beta).double()
    assert torch.autograd.gradcheck(norm, torch.randn(2, 6, 3, 2, dtype=torch.float64, requires_grad=True))


@pytest.mark.usefixtures("way")
def test_lrn_in_bfloat16_is_the_formula_but_for_rounding() -> None:
    a = torch.randn(2, 12, 5, 7, generator=torch.Generator().manual_seed(0)).mul(300).bfloat16()
    x = a.clone().requires_grad_()
    found = LocalResponseNorm(12)(x)
    found.sum().backward()
    exact = a.double().requires_grad_()
    expected = nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)(exact)
    expected.sum().backward()
    assert x.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=0, atol=0.02 * float(exact.grad.abs().max()))
