"""Statistics of a set: RGB equal to numpy's of all pixels, however counted; equal images under different classes."""

from __future__ import annotations

import collections
import shutil
from pathlib import Path

import numpy as np
import pytest

from jobs.shard_imagenet import print_equal_images
from pipeline.images.equal_images import equal_images
from pipeline.images.rgb_stats import RgbMoments, RgbStatistics
from tests.photographs import photograph, write_source
from tests.shard_sets import build_all, planned

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


# Equal images under different classes.


@pytest.mark.parametrize("seed", range(20))
def test_counts_agree_with_a_dictionary(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(0, 60))
    sizes, checksums = rng.integers(1, 4, count, np.uint32), rng.integers(0, 4, count, np.uint32)
    labels = rng.integers(0, 3, count, np.int32)
    places: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
    for i, image in enumerate(zip(sizes.tolist(), checksums.tolist(), strict=True)):
        places[image].append(i)
    several = [rows for rows in places.values() if len({labels[i] for i in rows}) > 1]
    found = equal_images(sizes, checksums, labels)
    assert found.images == sum(map(len, several))
    if several:
        (rows,) = [rows for rows in several if found.example in rows]
        assert found.most == len(rows) == max(map(len, several))
        assert found.classes == len({labels[i] for i in rows})


def test_placeholders_in_several_classes_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_source(tmp_path / "images", images=2, longest=280)
    print_equal_images(build_all(tmp_path / "out", planned(source)))
    assert capsys.readouterr().out == ""
    for i in range(4):
        shutil.copy(source / "n0" / "n0_0.JPEG", source / f"n{i % 3}" / f"gone_{i}.JPEG")
    print_equal_images(build_all(tmp_path / "more", planned(source)))
    assert "byte for byte: 5; one of them 5 times under 3 classes, as n" in capsys.readouterr().out
