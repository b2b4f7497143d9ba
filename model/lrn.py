"""Local response normalisation across channels (the paper, section 3.3).

b[c] = a[c] / (k + alpha * sum of a[j]^2 over the n maps nearest to c) ** beta

The paper multiplies the *sum* by alpha; `torch.nn.LocalResponseNorm` (and Caffe) multiply the *mean*, so their alpha
is n times ours. The sum over neighbouring maps is a 1 x 1 convolution with a banded matrix of ones, which is a plain
matrix product per pixel in either memory layout; the backward is written by hand so that it is one more such product.
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


class _LocalResponse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, band: Tensor, k: float, alpha: float, beta: float) -> Tensor:
        scale = F.conv2d(x * x, band).mul_(alpha).add_(k)
        power = _power(scale, beta)
        ctx.save_for_backward(x, band, scale, power)
        ctx.constants = alpha, beta  # type: ignore[attr-defined]
        return x * power

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, band, scale, power = ctx.saved_tensors  # type: ignore[attr-defined]
        alpha, beta = ctx.constants  # type: ignore[attr-defined]
        # d b[c] / d a[j] = [c = j] scale[c]^-beta - 2 alpha beta a[c] a[j] scale[c]^(-beta - 1) band[c, j],
        # and band is its own transpose.
        direct = grad * power
        shared = F.conv2d((direct * x).div_(scale), band).mul_(x)
        return direct.sub_(shared, alpha=2.0 * alpha * beta), None, None, None, None


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
        self.register_buffer("band", neighbour_matrix(channels, size)[:, :, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return _LocalResponse.apply(x, self.band.to(x.dtype), self.k, self.alpha, self.beta)

    def extra_repr(self) -> str:
        return f"{self.band.shape[0]}, size={self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"
