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

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

PAPER_K = 2.0  # section 3.3
PAPER_SIZE = 5  # section 3.3: n
PAPER_ALPHA = 1e-4  # section 3.3
PAPER_BETA = 0.75  # section 3.3
HALF = PAPER_SIZE // 2


class _ShiftedSums:
    """Sums over neighboring maps on a CPU, a few times quicker than by a matrix.

    The pixels lie in one long row, each with zeros on both sides of its channels: the row shifted by 0, 1, 2, ... and
    added up has each map's sum, and what runs over from one pixel to the next is zeros.
    """

    def __init__(self, part: Tensor) -> None:
        images, self._channels, height, width = part.shape
        shape = images, height, width, self._channels + 2 * HALF
        self._padded, self._sums = part.new_zeros(shape), part.new_empty(shape)
        self._inner = self._padded.narrow(-1, HALF, self._channels).movedim(-1, 1)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Of a * b, both [images, channels, height, width] as the part given first; good until the next call."""
        torch.mul(a, b, out=self._inner)
        row, sums = self._padded.flatten(), self._sums.flatten()
        length = len(row) - 2 * HALF
        sums[:length] = row[:length]
        for shift in range(1, 2 * HALF + 1):
            sums[:length] += row[shift : shift + length]
        return self._sums[..., : self._channels].movedim(-1, 1)


def _in_parts(x: Tensor) -> bool:
    """Whether to go image by image: on a CPU, whose cache then holds the intermediate results (measured to halve the
    time). On a GPU each piece costs launches, and an exported graph must hold for any batch."""
    return x.device.type == "cpu" and not torch.compiler.is_exporting()


def _parts(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Each tensor cut into images, or whole."""
    return [tensor.split(1) if _in_parts(tensor) else (tensor,) for tensor in tensors]


def _sums(x: Tensor, band: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    if _in_parts(x):
        return _ShiftedSums(x[:1])
    # By one product with the banded matrix: in an exported graph, and on devices without Triton.
    return lambda a, b: F.linear((a * b).movedim(1, -1), band).movedim(-1, 1)


def _power(root: Tensor) -> Tensor:
    """scale ** -3/4 from scale ** -1/2: a square root is cheaper than a general power."""
    return root.sqrt().mul_(root)


class _LocalResponse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, band: Tensor, k: float, alpha: float) -> Tensor:
        out, root = torch.empty_like(x), torch.empty_like(x, dtype=band.dtype)
        sums, constant = _sums(root, band), root.new_full((), k)
        for part, to, its_root in zip(*_parts(x, out, root), strict=True):
            wide = part.to(band.dtype)
            torch.add(constant, sums(wide, wide), alpha=alpha, out=its_root).rsqrt_()
            torch.mul(wide, _power(its_root), out=to)
        ctx.save_for_backward(x, band, root)
        ctx.alpha = alpha  # type: ignore[attr-defined]
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, band, root = ctx.saved_tensors  # type: ignore[attr-defined]
        # d b[c] / d a[j] = [c = j] scale[c]^-beta - 2 alpha beta a[c] a[j] scale[c]^(-beta - 1) band[c, j],
        # and band is its own transpose.
        factor = -2.0 * ctx.alpha * PAPER_BETA  # type: ignore[attr-defined]
        out, sums = torch.empty_like(x), _sums(root, band)
        for part, its_root, its_grad, to in zip(*_parts(x, root, grad, out), strict=True):
            wide = part.to(band.dtype)
            direct = _power(its_root).mul_(its_grad)
            shared = sums((direct * wide).mul_(its_root), its_root)
            torch.addcmul(direct, wide, shared, value=factor, out=to)
        return out, None, None, None


class LocalResponseNorm(nn.Module):
    """Normalizes [N, channels, H, W] of any float dtype across PAPER_SIZE neighboring maps; the shape is kept."""

    band: Tensor
    """[channels, channels]: 1 where two maps are neighbors, else 0."""

    def __init__(self, channels: int, alpha: float = PAPER_ALPHA, k: float = PAPER_K) -> None:
        super().__init__()
        self.alpha, self.k = alpha, k
        index = torch.arange(channels)
        # Not a parameter and not saved: it follows from the number of channels.
        self.register_buffer("band", ((index[:, None] - index).abs() <= HALF).float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and x.dtype != torch.float64 and not torch.compiler.is_exporting():
            # Only torch's builds for GPUs bring Triton.
            from model.lrn_triton import FusedLocalResponse

            return FusedLocalResponse.apply(x, PAPER_SIZE, self.k, self.alpha, PAPER_BETA)
        band = self.band.to(torch.promote_types(x.dtype, torch.float32))
        return _LocalResponse.apply(x, band, self.k, self.alpha)
