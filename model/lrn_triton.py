"""Local response normalization on a GPU: one kernel forward, one backward (see `model.lrn` for the formula).

A program has the channels of some pixels in registers and finds neighbors there, so that each value is read once. Sums
and powers are float32, whatever the maps are. The backward computes the sums again, which is quicker than to write and
read them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Values of one program. On an H200, 2,048 and 4,096 take 14 to 48 % longer, and two warps instead of four 6 to 53 %.
VALUES = 1024


@triton.jit
def _neighbor_sums(values, channel, HALF: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    sums = values
    for shift in tl.static_range(1, HALF + 1):
        above, below = channel + shift, channel - shift
        sums += tl.where(above < COLUMNS, tl.gather(values, tl.minimum(above, COLUMNS - 1), 1), 0.0)
        sums += tl.where(below >= 0, tl.gather(values, tl.maximum(below, 0), 1), 0.0)
    return sums


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x,
    out,
    pixels,
    k,
    alpha,
    beta,
    CHANNELS: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.broadcast_to(tl.arange(0, COLUMNS)[None, :], (ROWS, COLUMNS))
    place = pixel.to(tl.int64) * CHANNELS + channel
    inside = (pixel < pixels) & (channel < CHANNELS)
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    scale = k + alpha * _neighbor_sums(value * value, channel, HALF, COLUMNS)
    result = value * tl.exp2(-beta * tl.log2(scale))
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    x,
    grad,
    out,
    pixels,
    k,
    alpha,
    beta,
    CHANNELS: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.broadcast_to(tl.arange(0, COLUMNS)[None, :], (ROWS, COLUMNS))
    place = pixel.to(tl.int64) * CHANNELS + channel
    inside = (pixel < pixels) & (channel < CHANNELS)
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    given = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    scale = k + alpha * _neighbor_sums(value * value, channel, HALF, COLUMNS)
    direct = given * tl.exp2(-beta * tl.log2(scale))
    shared = _neighbor_sums(direct * value / scale, channel, HALF, COLUMNS)
    result = direct - 2.0 * alpha * beta * value * shared
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


def _launch(kernel: Any, *maps: Tensor, size: int, k: float, alpha: float, beta: float) -> None:
    """Runs a kernel over maps [N, channels, H, W] in channels_last memory, the last of which it writes."""
    images, channels, height, width = maps[0].shape
    pixels, columns = images * height * width, triton.next_power_of_2(channels)
    rows = max(1, VALUES // columns)
    # Triton launches on the current GPU, which need not be the maps'.
    with torch.cuda.device_of(maps[0]):
        kernel[(triton.cdiv(pixels, rows),)](
            *maps, pixels, k, alpha, beta, CHANNELS=channels, HALF=size // 2, ROWS=rows, COLUMNS=columns
        )


class FusedLocalResponse(torch.autograd.Function):
    """(x [N, channels, H, W] of float32 or less, size, k, alpha, beta) -> the same shape and dtype, channels_last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, k: float, alpha: float, beta: float) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        out = torch.empty_like(x)
        ctx.constants = {"size": size, "k": k, "alpha": alpha, "beta": beta}
        _launch(_forward, x, out, **ctx.constants)
        ctx.save_for_backward(x)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (x,) = ctx.saved_tensors
        out = torch.empty_like(x)
        _launch(_backward, x, grad.contiguous(memory_format=torch.channels_last), out, **ctx.constants)
        return out, None, None, None, None
