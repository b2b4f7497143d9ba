"""RGB statistics: equal to numpy's covariance and eigendecomposition of all pixels, however they were counted."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.images.rgb_stats import RgbMoments, RgbStatistics
from tests.photographs import photograph

IMAGES = [photograph(seed, 60 + seed, 40 + 2 * seed) for seed in range(8)]
PIXELS = np.concatenate([image.reshape(-1, 3) for image in IMAGES]).astype(np.float64) / 255


def merged() -> RgbMoments:
    return sum((RgbMoments.of(image) for image in IMAGES), RgbMoments())


def test_equals_numpy_on_all_pixels() -> None:
    statistics = RgbStatistics.of(merged())
    covariance = np.cov(PIXELS.T, ddof=0)
    values, vectors = np.linalg.eigh(covariance)
    np.testing.assert_allclose(statistics.mean, PIXELS.mean(axis=0), rtol=0, atol=1e-9)
    np.testing.assert_allclose(statistics.std, PIXELS.std(axis=0), rtol=0, atol=1e-9)
    np.testing.assert_allclose(statistics.covariance, covariance, rtol=0, atol=1e-9)
    np.testing.assert_allclose(statistics.eigenvalues, values[::-1], rtol=0, atol=1e-9)
    # Each vector is known up to its sign, which is ours to fix.
    ours = np.array(statistics.eigenvectors)
    np.testing.assert_allclose(np.abs((ours * vectors[:, ::-1]).sum(axis=0)), 1, rtol=0, atol=1e-9)
    assert (ours[np.abs(ours).argmax(axis=0), range(3)] > 0).all()
    assert statistics.pixels == len(PIXELS)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (16, 16), (1, 257), (300, 257)])
def test_the_brightest_images_are_counted_exactly(height: int, width: int) -> None:
    image = np.random.default_rng(0).integers(250, 256, (height, width, 3), dtype=np.uint8)
    moments = RgbMoments.of(image)
    levels = image.reshape(-1, 3).astype(np.int64)
    assert moments.sums == tuple(levels.sum(axis=0))
    assert moments.products == tuple((levels[:, i] * levels[:, j]).sum() for i in range(3) for j in range(i, 3))


def test_merging_is_exact_in_any_order_and_grouping() -> None:
    parts = [RgbMoments.of(image) for image in IMAGES]
    whole = RgbMoments.of(np.concatenate([image.reshape(-1, 1, 3) for image in IMAGES]))
    assert merged() == whole
    assert sum(reversed(parts), RgbMoments()) == whole
    assert sum(parts[:3], RgbMoments()) + sum(parts[3:], RgbMoments()) == whole


def test_small_differences_survive_large_sums() -> None:
    # 10^15 pixels of 254 and as many of 255: in floating point the variance, 1/4 of a level squared, would drown.
    n = 10**15
    square, sums = n * (254**2 + 255**2), n * (254 + 255)
    statistics = RgbStatistics.of(RgbMoments(2 * n, (sums,) * 3, (square,) * 6))
    assert statistics.std[0] * 255 == pytest.approx(0.5, rel=1e-12)
