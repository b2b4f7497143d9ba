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
from tests.damage import flip_in_the_middle, own_copy, places

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
    plan = Plan(len(jpegs), 15, 3, color_matrix(info.rgb))
    runs = [list(Loader(reader, info.rgb, 15, CPU, 2).run(plan.epoch(0))) for reader in (jpegs, pixels)]
    assert len(runs[0]) == plan.steps
    for one, two in zip(*runs, strict=True):
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.labels, two.labels)
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


def test_a_batch_stays_as_it_is_while_later_ones_are_made(shard_set: Path) -> None:
    info = read_dataset(shard_set)
    reader = SplitReader(shard_set, info, "train")
    plan = Plan(len(reader), 5, 3, color_matrix(info.rgb))
    loader = Loader(reader, info.rgb, 5, CPU, 2)
    held, copies = [], []
    for batch in loader.run(plan.epoch(0)):
        held.append(batch.images)
        copies.append(batch.images.clone())
    del loader
    assert all(torch.equal(one, two) for one, two in zip(held, copies, strict=True))


def test_a_shard_that_is_not_what_the_set_says_is_refused(shard_set: Path, tmp_path: Path) -> None:
    root = own_copy(shard_set, tmp_path / "set")
    place = places(root, "train")[23]
    flip_in_the_middle(place)
    with pytest.raises(DatasetError, match=r"train-000002\.tar is not the shard that dataset\.json describes"):
        stage_pixels(str(root), tmp_path / "disk", lambda _: None, 1)
    assert not list((tmp_path / "disk").rglob("dataset.json"))
    (place.tar).write_bytes((shard_set / "train" / place.tar.name).read_bytes())
    staged = stage_pixels(str(root), tmp_path / "disk", lambda _: None, 1)
    assert sorted(path.name for path in staged.iterdir()) == [
        *("dataset.json", "pixels.json", "staged.json", "train", "train.arrow", "val", "val.arrow")
    ]
