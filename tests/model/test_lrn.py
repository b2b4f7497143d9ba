"""Local response normalization against section 3.3's formula in float64: on a CPU, in an exported graph, on a GPU.

The kernels for a GPU are run by Triton's interpreter.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from model.lrn import LocalResponseNorm

# So that sums matter, with maps in the tens: the paper's alpha is 1e-4.
K, ALPHA = 2.0, 1e-2
# The interpreter cuts off where a GPU rounds to bfloat16: 2^-7 of each value, not 2^-8.
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2.0**-7}
ON_CPU = [(way, dtype) for way in ("image by image", "whole") for dtype in ROUNDING]


@pytest.fixture(scope="module")
def lrn_triton() -> Iterator[ModuleType]:
    """The module, whose kernels run on the CPU. Triton decides when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        sys.modules.pop("model.lrn_triton", None)
        yield importlib.import_module("model.lrn_triton")
        del sys.modules["model.lrn_triton"]


def formula(x: Tensor) -> Tensor:
    """Of float64 maps, map by map, with n = 5 and beta = 0.75."""
    squares = [x[:, max(0, c - 2) : c + 3].square().sum(1) for c in range(x.shape[1])]
    return x / (K + ALPHA * torch.stack(squares, dim=1)) ** 0.75


# Channels that are no power of two, fewer than neighbors, those of both layers, and more pixels than a program has.
@pytest.mark.paper
@pytest.mark.parametrize("channels", [3, 7, 96, 256])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("way", "dtype"), [*ON_CPU, ("kernels", torch.float32), ("kernels", torch.bfloat16)], ids=str)
def test_lrn_is_the_papers_formula_and_its_gradient(
    way: str,
    dtype: torch.dtype,
    layout: torch.memory_format,
    channels: int,
    lrn_triton: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if way == "whole":
        monkeypatch.setattr("model.lrn._in_parts", lambda x: False)
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(2, channels, 7, 9, generator=generator).mul(40).to(dtype).contiguous(memory_format=layout)
    grad = torch.randn(2, channels, 7, 9, generator=generator).to(dtype)
    mine, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    if way == "kernels":
        found = lrn_triton.FusedLocalResponse.apply(mine, 5, K, ALPHA, 0.75)
    else:
        found = LocalResponseNorm(channels, ALPHA, K)(mine)
    expected = formula(exact)
    found.backward(grad)
    expected.backward(grad.double())
    assert mine.grad is not None
    assert exact.grad is not None
    assert found.dtype == mine.grad.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=ROUNDING[dtype], atol=0)
    torch.testing.assert_close(mine.grad.double(), exact.grad, rtol=ROUNDING[dtype], atol=ROUNDING[dtype] / 10)


def test_the_layer_takes_the_kernels_on_a_gpu(lrn_triton: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 96, 5, 5).contiguous(memory_format=torch.channels_last) * 40
    expected = LocalResponseNorm(96)(x)
    kernels: list[object] = []
    launch = lrn_triton._launch

    def noted(kernel: object, *maps: Tensor, **constants: float) -> None:
        kernels.append(kernel)
        launch(kernel, *maps, **constants)

    monkeypatch.setattr(lrn_triton, "_launch", noted)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    found = LocalResponseNorm(96)(x)
    monkeypatch.undo()
    assert kernels == [lrn_triton._forward]
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
