"""An antialiased bicubic resize in float64 as two matrix products: what stored images are compared with."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.images.decode import IMAGE_SIZE


def central_square(image: NDArray[Any]) -> NDArray[np.float64]:
    """[IMAGE_SIZE, IMAGE_SIZE, 3] of a [height, width, 3] image: its central square, to a whole pixel, resized."""
    height, width = image.shape[:2]
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : top + side, left : left + side].astype(np.float64)
    matrix = weights(side)
    resized = np.einsum("yh,hwc,xw->yxc", matrix, square, matrix, optimize=True)
    return np.clip(resized, 0, 255)


def weights(side: int) -> NDArray[np.float64]:
    """[IMAGE_SIZE, side]: an antialiased bicubic (a = -0.5) resize of `side` pixels as a matrix."""
    scale = side / IMAGE_SIZE
    center = (np.arange(IMAGE_SIZE) + 0.5) * scale
    x = np.abs((np.arange(side)[None, :] + 0.5 - center[:, None]) / max(scale, 1.0))
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    kernel = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return kernel / kernel.sum(axis=1, keepdims=True)
