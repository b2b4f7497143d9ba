"""Local response normalization across channels (the paper, section 3.3).

b[c] = a[c] / (k + alpha * sum of a[j]^2 over the n maps nearest to c) ** beta

The paper multiplies the *sum* by alpha; `torch.nn.LocalResponseNorm` (and Caffe) multiply the *mean*, so their alpha
is n times ours. On a GPU one kernel does it (`model.lrn_triton`). On a CPU the sums over neighboring maps are some
shifted additions; in an exported graph they are, at each pixel, a product with a banded matrix of ones. All are
quickest in channels_last memory. The backward is written by hand: it is one more such sum, and of the forward only the
roots are kept. Sums and powers are float32 or wider, also of bfloat16 maps: rounded to bfloat16, they would turn the
gradient of conv1.
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


def neighbor_matrix(channels: int, size: int) -> Tensor:
    """The [channels, channels] float32 matrix whose entry (c, j) is 1 where |c - j| <= size // 2, else 0."""
    index = torch.arange(channels)
    return ((index[:, None] - index[None, :]).abs() <= size // 2).float()


class _ShiftedSums:
    """Sums over neighboring maps on a CPU, a few times quicker than by a matrix.

    The pixels lie in one long row, each with zeros on both sides of its channels: the row shifted by 0, 1, 2, ... and
    added up has each map's sum, and what runs over from one pixel to the next is zeros.
    """

    def __init__(self, part: Tensor, size: int) -> None:
        images, self._channels, height, width = part.shape
        self._shifts = 2 * (size // 2)
        shape = images, height, width, self._channels + self._shifts
        self._padded, self._sums = part.new_zeros(shape), part.new_empty(shape)
        self._inner = self._padded.narrow(-1, size // 2, self._channels).movedim(-1, 1)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Of a * b, both [images, channels, height, width] as the part given first; good until the next call."""
        torch.mul(a, b, out=self._inner)
        row, sums = self._padded.flatten(), self._sums.flatten()
        length = len(row) - self._shifts
        sums[:length] = row[:length]
        for shift in range(1, self._shifts + 1):
            sums[:length] += row[shift : shift + length]
        return self._sums[..., : self._channels].movedim(-1, 1)


class _BandedSums:
    """The same by one product with the banded matrix: in an exported graph, and on devices without Triton."""

    def __init__(self, band: Tensor) -> None:
        self._band = band

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return F.linear((a * b).movedim(1, -1), self._band).movedim(-1, 1)


def _in_parts(x: Tensor) -> bool:
    """Whether to go image by image: on a CPU, whose cache then holds the intermediate results (measured to halve the
    time). On a GPU each piece costs launches, and an exported graph must hold for any batch."""
    return x.device.type == "cpu" and not torch.compiler.is_exporting()


def _parts(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Each tensor cut into images, or whole."""
    return [tensor.split(1) if _in_parts(tensor) else (tensor,) for tensor in tensors]


def _sums(x: Tensor, band: Tensor, size: int) -> _ShiftedSums | _BandedSums:
    return _ShiftedSums(x[:1], size) if _in_parts(x) else _BandedSums(band)


def _power(root: Tensor, beta: float) -> Tensor:
    """scale ** -beta from scale ** -1/2; for the paper's 3/4 by a square root, cheaper than a general power."""
    return root.sqrt().mul_(root) if beta == 0.75 else root.pow(2 * beta)


class _LocalResponse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, band: Tensor, size: int, k: float, alpha: float, beta: float) -> Tensor:
        out, root = torch.empty_like(x), torch.empty_like(x, dtype=band.dtype)
        sums, constant = _sums(root, band, size), root.new_full((), k)
        for part, to, its_root in zip(*_parts(x, out, root), strict=True):
            wide = part.to(band.dtype)
            torch.add(constant, sums(wide, wide), alpha=alpha, out=its_root).rsqrt_()
            torch.mul(wide, _power(its_root, beta), out=to)
        ctx.save_for_backward(x, band, root)
        ctx.constants = size, alpha, beta  # type: ignore[attr-defined]
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        x, band, root = ctx.saved_tensors  # type: ignore[attr-defined]
        size, alpha, beta = ctx.constants  # type: ignore[attr-defined]
        # d b[c] / d a[j] = [c = j] scale[c]^-beta - 2 alpha beta a[c] a[j] scale[c]^(-beta - 1) band[c, j],
        # and band is its own transpose.
        out, sums = torch.empty_like(x), _sums(root, band, size)
        for part, its_root, its_grad, to in zip(*_parts(x, root, grad, out), strict=True):
            wide = part.to(band.dtype)
            direct = _power(its_root, beta).mul_(its_grad)
            shared = sums((direct * wide).mul_(its_root), its_root)
            torch.addcmul(direct, wide, shared, value=-2.0 * alpha * beta, out=to)
        return out, None, None, None, None, None


class LocalResponseNorm(nn.Module):
    """Normalizes [N, channels, H, W] of any float dtype across `size` neighboring maps; the shape is kept."""

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
        self.register_buffer("band", neighbor_matrix(channels, size), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        constants = self.size, self.k, self.alpha, self.beta
        if x.is_cuda and x.dtype != torch.float64 and not torch.compiler.is_exporting():
            # Only torch's builds for GPUs bring Triton.
            from model.lrn_triton import FusedLocalResponse

            return FusedLocalResponse.apply(x, *constants)
        return _LocalResponse.apply(x, self.band.to(torch.promote_types(x.dtype, torch.float32)), *constants)

    def extra_repr(self) -> str:
        return f"{self.band.shape[0]}, size={self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"
