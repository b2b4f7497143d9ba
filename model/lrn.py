"""Local response normalisation across channels (the paper, section 3.3).

b[c] = a[c] / (k + alpha * sum of a[j]^2 over the n maps nearest to c) ** beta

The paper multiplies the *sum* by alpha; `torch.nn.LocalResponseNorm` (and Caffe) multiply the *mean*, so their alpha
is n times ours. The sum over neighbouring maps is a product with a banded matrix of ones at each pixel, quickest in
channels_last memory; the backward is written by hand so that it is one more such product, and only the sums are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

PAPER_K = 2.0  # section 3.3
PAPER_SIZE = 5  # section 3.3: n
PAPER_ALPHA = 1e-4  # section 3.3
PAPER_BETA = 0.75  # section 3.3


def neighbour_matrix(channels: int, size: int) -> Tensor:
    """The [channels, channels] float32 matrix whose entry (c, j) is 1 where |c - j| <= size // 2, else 0."""
    index = torch.arange(channels)
    return ((index[:, None] - index[None, :]).abs() <= size // 2).float()


def _power(scale: Tensor, beta: float) -> Tensor:
    """scale ** -beta; for the paper's 3/4 by two square roots, several times cheaper than a general power."""
    if beta == 0.75:
        root = scale.rsqrt()
        return root.sqrt().mul_(root)
    return scale.pow(-beta)


def _mix(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """At each pixel, the channels times a matrix: [N, C, H, W] -> the same, in channels_last memory."""
    return F.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)


class _LocalResponse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, band: Tensor, k: float, alpha: float, beta: float) -> Tensor:
        out, scale = torch.empty_like(x), torch.empty_like(x)
        weight, bias = band * alpha, x.new_full((x.shape[1],), k)
        for part, to, its_scale in zip(*_parts(x, out, scale), strict=True):
            its_scale.copy_(_mix(part * part, weight, bias))
            torch.mul(part, _power(its_scale, beta), out=to)
        ctx.save_for_backward(x, band, scale)
        ctx.constants = alpha, beta  # type: ignore[attr-defined]
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, band, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        alpha, beta = ctx.constants  # type: ignore[attr-defined]
        # d b[c] / d a[j] = [c = j] scale[c]^-beta - 2 alpha beta a[c] a[j] scale[c]^(-beta - 1) band[c, j],
        # and band is its own transpose.
        out = torch.empty_like(x)
        weight = band * (-2.0 * alpha * beta)
        for part, its_scale, its_grad, to in zip(*_parts(x, scale, grad, out), strict=True):
            direct = _power(its_scale, beta).mul_(its_grad)
            shared = _mix((direct * part).div_(its_scale), weight)
            torch.addcmul(direct, part, shared, out=to)
        return out, None, None, None, None


def _parts(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Each tensor cut into pieces of its batch: on a CPU, single images, whose intermediate results stay in its cache
    (measured to halve the time); on a GPU whole, since each piece costs launches, and while a graph is exported, which
    must hold for any batch."""
    if tensors[0].device.type == "cpu" and not torch.compiler.is_exporting():
        return [tensor.split(1) for tensor in tensors]
    return [(tensor,) for tensor in tensors]


class LocalResponseNorm(nn.Module):
    """Normalises [N, channels, H, W] of any float dtype across `size` neighbouring maps; the shape is kept."""

    band: Tensor

    def __init__(
        self,
        channels: int,
        size: int = PAPER_SIZE,
        alpha: float = PAPER_ALPHA,
        beta: float = PAPER_BETA,
        k: float = PAPER_K,
    ) -> None:
        super().__init__()
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k
        # Not a parameter and not saved: it follows from the arguments.
        self.register_buffer("band", neighbour_matrix(channels, size), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return _LocalResponse.apply(x, self.band.to(x.dtype), self.k, self.alpha, self.beta)

    def extra_repr(self) -> str:
        return f"{self.band.shape[0]}, size={self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"
