"""Equal images under different classes are counted as a dictionary counts them."""

from __future__ import annotations

import collections
import shutil
from pathlib import Path

import numpy as np
import pytest

from jobs.shard_imagenet import print_equal_images
from pipeline.images.equal_images import equal_images
from tests.photographs import write_source
from tests.shard_sets import build_all, planned


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
