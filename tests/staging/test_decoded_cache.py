"""Decoded pixels: the same batches as from JPEG, whole or refused, and once a node."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.dataset.info import DatasetError, read_dataset
from pipeline.dataset.split_reader import SplitReader
from pipeline.loading.loader import Loader
from pipeline.loading.plan import Plan, color_matrix
from pipeline.staging.decoded_cache import stage_pixels

CPU = torch.device("cpu")


def test_pixels_are_the_jpegs_and_give_the_same_batches(shard_set: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    staged = stage_pixels(str(shard_set), tmp_path, lines.append, 2)
    info = read_dataset(staged)
    jpegs, pixels = SplitReader(shard_set, read_dataset(shard_set), "train"), SplitReader(staged, info, "train")
    assert (jpegs.pixels, pixels.pixels) == (False, True)
    np.testing.assert_array_equal(pixels.labels, jpegs.labels)
    for sample in range(len(jpegs)):
        assert pixels.key(sample) == jpegs.key(sample)
        decoded = np.asarray(Image.open(io.BytesIO(jpegs.image(sample).tobytes())))
        np.testing.assert_array_equal(pixels.image(sample), decoded)
    plan = Plan(len(jpegs), 5, 3, color_matrix(info.rgb))
    runs = []
    for reader in (jpegs, pixels):
        batches = Loader(reader, info.rgb, 5, CPU, 2).run(plan.epoch(0))
        runs.append([(batch.images, batch.images.clone(), batch.labels) for batch in batches])
    assert len(runs[0]) == plan.steps
    for one, two in zip(*runs, strict=True):
        assert all(torch.equal(mine, other) for mine, other in zip(one, two, strict=True))
        # A batch stays as it is while later ones are made.
        assert torch.equal(one[0], one[1])
    assert sorted(path.name for path in staged.iterdir()) == [
        *("dataset.json", "pixels.json", "staged.json", "train", "train.arrow", "val", "val.arrow")
    ]
    lines.clear()
    assert stage_pixels(str(shard_set), tmp_path, lines.append, 2) == staged
    assert lines == []


def test_an_interrupted_decoding_goes_on_and_a_cut_file_is_refused(shard_set: Path, tmp_path: Path) -> None:
    staged = stage_pixels(str(shard_set), tmp_path, lambda _: None, 2)
    kept, lost = staged / "train" / "train-000000.rgb", staged / "train" / "train-000001.rgb"
    whole, before = lost.read_bytes(), kept.stat().st_ino
    lost.write_bytes(whole[:-1])
    with pytest.raises(DatasetError, match=rf"this is a staged copy, so delete {lost} and run the same command again"):
        SplitReader(staged, read_dataset(staged), "train")
    lost.unlink()
    stage_pixels(str(shard_set), tmp_path, lambda _: None, 2)
    assert lost.read_bytes() == whole
    assert kept.stat().st_ino == before
