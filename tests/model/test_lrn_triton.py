"""The kernels for a GPU, run by Triton's interpreter, against section 3.3's formula in float64."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from model.lrn import LocalResponseNorm


@pytest.fixture(scope="module")
def lrn_triton() -> Iterator[ModuleType]:
    """The module, whose kernels run on the CPU. Triton decides when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        sys.modules.pop("model.lrn_triton", None)
        yield importlib.import_module("model.lrn_triton")
        del sys.modules["model.lrn_triton"]


def formula(x: torch.Tensor, size: int, k: float, alpha: float, beta: float) -> torch.Tensor:
    """Of float64 maps, map by map."""
    half, channels = size // 2, x.shape[1]
    squares = [x[:, max(0, c - half) : c + half + 1].square().sum(1) for c in range(channels)]
    return x / (k + alpha * torch.stack(squares, dim=1)) ** beta


# Channels that are no power of two, fewer than neighbors, those of both layers, and more pixels than a program has.
@pytest.mark.parametrize(("channels", "size"), [(3, 5), (7, 5), (96, 5), (256, 5), (12, 3)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_are_the_formula_and_its_gradient(
    lrn_triton: ModuleType, channels: int, size: int, layout: torch.memory_format, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(2, channels, 7, 9, generator=generator).mul(40).to(dtype).contiguous(memory_format=layout)
    grad = torch.randn(2, channels, 7, 9, generator=generator).to(dtype)
    constants = size, 2.0, 1e-2, 0.75
    mine, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    found = lrn_triton.FusedLocalResponse.apply(mine, *constants)
    expected = formula(exact, *constants)
    found.backward(grad)
    expected.backward(grad.double())
    assert mine.grad is not None
    assert exact.grad is not None
    assert found.dtype == mine.grad.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    # The interpreter cuts off where a GPU rounds to bfloat16: 2^-7 of each value, not 2^-8.
    relative = 2e-6 if dtype == torch.float32 else 2.0**-7
    torch.testing.assert_close(found.double(), expected, rtol=relative, atol=0)
    torch.testing.assert_close(mine.grad.double(), exact.grad, rtol=relative, atol=relative * 1e-1)


def test_the_layer_takes_the_kernels_on_a_gpu(lrn_triton: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 96, 5, 5).contiguous(memory_format=torch.channels_last) * 40
    expected = LocalResponseNorm(96)(x)
    kernels: list[object] = []
    launch = lrn_triton._launch
    monkeypatch.setattr(
        lrn_triton, "_launch", lambda kernel, *maps, **by: (kernels.append(kernel), launch(kernel, *maps, **by))
    )
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    found = LocalResponseNorm(96)(x)
    monkeypatch.undo()
    assert kernels == [lrn_triton._forward]
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
