"""An antialiased bicubic resize in float64 as two matrix products: what stored images are compared with."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.dataset import IMAGE_SIZE


def central_square(image: NDArray[Any]) -> NDArray[np.float64]:
    """[IMAGE_SIZE, IMAGE_SIZE, 3] of a [height, width, 3] image: the shorter side to IMAGE_SIZE, then the centre."""
    height, width = image.shape[:2]
    side = min(width, height)
    rows = weights(height, (height - side) / 2, side)
    columns = weights(width, (width - side) / 2, side)
    resized = np.einsum("yh,hwc,xw->yxc", rows, image.astype(np.float64), columns, optimize=True)
    return np.clip(resized, 0, 255)


def weights(length: int, start: float, side: float) -> NDArray[np.float64]:
    """[IMAGE_SIZE, length]: an antialiased bicubic (a = -0.5) resize of [start, start + side) as a matrix."""
    scale = side / IMAGE_SIZE
    stretch = max(scale, 1.0)
    centre = start + (np.arange(IMAGE_SIZE) + 0.5) * scale
    x = np.abs((np.arange(length)[None, :] + 0.5 - centre[:, None]) / stretch)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    kernel = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return kernel / kernel.sum(axis=1, keepdims=True)
