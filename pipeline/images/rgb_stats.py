"""Exact statistics of a data set's RGB values: integer moments, then mean, covariance and its eigenvectors.

The moments are sums of integers, so shards can be counted apart, in any order, and merged without rounding; floating
point enters once, at the end. The eigenvectors and eigenvalues are the p and lambda of the paper's color shift
(section 4.1), with RGB scaled to [0, 1].
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_LEVEL = 255
EXACT_SUM = 256  # So many products of two levels stay below 2^24, up to which float32 holds every whole number.
CHANNELS = 3

Vector = tuple[float, float, float]
Matrix = tuple[Vector, Vector, Vector]


@dataclasses.dataclass(frozen=True)
class RgbMoments:
    """Sums over pixels with values 0..255, as Python integers (they do not overflow)."""

    pixels: int = 0
    """How many pixels were counted."""
    sums: tuple[int, int, int] = (0, 0, 0)
    """Sums of r, g, b."""
    products: tuple[int, int, int, int, int, int] = (0, 0, 0, 0, 0, 0)
    """Sums of rr, rg, rb, gg, gb, bb."""

    @classmethod
    def of(cls, image: NDArray[np.uint8]) -> RgbMoments:
        """The moments of one [height, width, 3] uint8 image."""
        height, width = image.shape[:2]
        rows = image.reshape(height, -1)
        sums = np.zeros((4, CHANNELS), np.int64)
        for top in range(0, height, EXACT_SUM):
            # Down so few rows float32 sums exactly, in any order, and several times as fast as integers are summed.
            block = rows[top : top + EXACT_SUM].astype(np.float32)
            columns = np.zeros((4, block.shape[1]), np.float32)
            np.matmul(np.ones(len(block), np.float32), block, out=columns[0])
            # A value beside itself, the next and the one after: rr gg bb, rg gb and rb. The channels stay interleaved,
            # as parting them costs as much as all of this; a product with the next pixel's value is not looked at.
            for lag in range(CHANNELS):
                left, right = block[:, : block.shape[1] - lag], block[:, lag:]
                np.einsum("ij,ij->j", left, right, out=columns[1 + lag, : left.shape[1]])
            sums += columns.astype(np.int64).reshape(4, width, CHANNELS).sum(axis=1)
        (r, g, b), (rr, gg, bb), (rg, gb, _), (rb, _, _) = sums.tolist()
        return cls(height * width, (r, g, b), (rr, rg, rb, gg, gb, bb))

    def __add__(self, other: RgbMoments) -> RgbMoments:
        r, g, b = (x + y for x, y in zip(self.sums, other.sums, strict=True))
        rr, rg, rb, gg, gb, bb = (x + y for x, y in zip(self.products, other.products, strict=True))
        return RgbMoments(self.pixels + other.pixels, (r, g, b), (rr, rg, rb, gg, gb, bb))

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> RgbMoments:
        r, g, b = map(int, value["sums"])
        rr, rg, rb, gg, gb, bb = map(int, value["products"])
        return cls(int(value["pixels"]), (r, g, b), (rr, rg, rb, gg, gb, bb))


@dataclasses.dataclass(frozen=True)
class RgbStatistics:
    """Mean, covariance and principal components of RGB values scaled to [0, 1]."""

    pixels: int
    """How many pixels were counted."""
    mean: Vector
    """Mean of r, g, b."""
    std: Vector
    """Population standard deviation of r, g, b."""
    covariance: Matrix
    """Population covariance, [3][3]."""
    eigenvalues: Vector
    """Of the covariance, descending."""
    eigenvectors: Matrix
    """[3][3]: column j belongs to eigenvalue j, rows in RGB order; each column's largest component is positive."""

    @classmethod
    def of(cls, moments: RgbMoments) -> RgbStatistics:
        """The statistics of some moments.

        Raises:
            ValueError: if no pixel was counted.
        """
        n = moments.pixels
        if n == 0:
            raise ValueError("no pixel was counted: the training split is empty")
        rr, rg, rb, gg, gb, bb = moments.products
        second = [[rr, rg, rb], [rg, gg, gb], [rb, gb, bb]]
        # n * sum(xy) - sum(x) * sum(y) in integers: the difference that would lose digits in floating point.
        covariance = np.array(
            [
                [(n * second[i][j] - moments.sums[i] * moments.sums[j]) / (n * n * MAX_LEVEL**2) for j in range(3)]
                for i in range(3)
            ]
        )
        values, vectors = np.linalg.eigh(covariance)
        values, vectors = values[::-1], vectors[:, ::-1]
        largest = np.abs(vectors).argmax(axis=0)
        vectors = vectors * np.sign(vectors[largest, range(3)])
        return cls(
            pixels=n,
            mean=_vector(total / (n * MAX_LEVEL) for total in moments.sums),
            std=_vector(np.sqrt(covariance.diagonal())),
            covariance=_matrix(covariance),
            eigenvalues=_vector(np.maximum(values, 0.0)),
            eigenvectors=_matrix(vectors),
        )

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> RgbStatistics:
        return cls(
            pixels=int(value["pixels"]),
            mean=_vector(value["mean"]),
            std=_vector(value["std"]),
            covariance=_matrix(value["covariance"]),
            eigenvalues=_vector(value["eigenvalues"]),
            eigenvectors=_matrix(value["eigenvectors"]),
        )


def _vector(values: Any) -> Vector:
    r, g, b = (float(value) for value in values)
    if not all(map(math.isfinite, (r, g, b))):
        raise ValueError(f"{(r, g, b)} are not finite numbers")
    return r, g, b


def _matrix(rows: Any) -> Matrix:
    r, g, b = (_vector(row) for row in rows)
    return r, g, b
