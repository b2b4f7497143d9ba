"""Equal images under different classes are counted as a dictionary counts them."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from pipeline.images.equal_images import equal_images


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


def test_equal_images_of_one_class_are_not_meant() -> None:
    assert equal_images(np.ones(5, np.uint32), np.ones(5, np.uint32), np.ones(5, np.int32)).images == 0
