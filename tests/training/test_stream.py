"""What the network is fed is one stream, whatever executes it: digests of pixels and labels after decoding.

The data come through the class that training uses. What the stream should be is read from the tars with `tarfile`,
decoded with Pillow and computed in float64.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from jobs.training.data import WorkerData
from model.recipe import Recipe
from model.training import Worker
from pipeline.dataset.info import read_dataset
from pipeline.loading.loader import Batch
from pipeline.loading.plan import Plan, PlannedBatch, color_matrix
from pipeline.loading.reader_process import ReaderProcess

TRAIN, VAL = 45, 15  # Images in the set.
SEED = 11
Steps = list[list[str]]


def workers(shard_set: Path, world: int, micro_batch: int, threads: int = 1) -> list[WorkerData]:
    """All ranks' data, as each of them would open it."""
    recipe = Recipe(batch_size=13, seed=SEED, epochs=5)
    cpu = torch.device("cpu")
    return [WorkerData(shard_set, recipe, Worker(rank, world, cpu), micro_batch, threads) for rank in range(world)]


def digests(batch: Batch) -> Iterator[str]:
    """One for each image: its pixels as the network gets them, and its label."""
    for image, label in zip(batch.images, batch.labels, strict=True):
        yield hashlib.sha256(image.contiguous().numpy().tobytes() + int(label).to_bytes(8, "little")).hexdigest()


def stream(ranks: list[WorkerData], epoch: int, first_step: int = 0, stop: int | None = None) -> Steps:
    """The digests of each global batch in its order: rank after rank, micro-batch after micro-batch."""
    parts = []
    for data in ranks:
        steps = itertools.islice(data.training(epoch, first_step), None if stop is None else stop - first_step)
        parts.append([[d for batch in micro_batches for d in digests(batch)] for micro_batches in steps])
    return [[d for part in step for d in part] for step in zip(*parts, strict=True)]


def stored(shard_set: Path, split: str) -> tuple[list[NDArray[np.float64]], list[int]]:
    """Every image of a split [256, 256, 3] and its label, in the tars' order."""
    images, labels = [], []
    for path in sorted((shard_set / split).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                data = tar.extractfile(member).read()  # type: ignore[union-attr]
                if member.name.endswith(".jpg"):
                    images.append(np.asarray(Image.open(io.BytesIO(data)), np.float64))
                else:
                    labels.append(int(data))
    return images, labels


def assert_pixels(image: torch.Tensor, expected: NDArray[np.float64], shard_set: Path) -> None:
    """Within a gray level of a view [227, 227, 3] less the mean."""
    mean = np.array(read_dataset(shard_set).rgb.mean) * 255
    assert np.abs(image.numpy() - (expected - mean).transpose(2, 0, 1)).max() <= 1


@pytest.fixture(scope="module")
def one(shard_set: Path) -> list[WorkerData]:
    """One worker with one thread and whole batches."""
    return workers(shard_set, 1, 13)


@pytest.fixture(scope="module")
def whole(one: list[WorkerData]) -> Steps:
    """Its epoch 3: three steps in which no view comes twice."""
    steps = stream(one, 3)
    assert [len(step) for step in steps] == [13, 13, 13]
    assert len({digest for step in steps for digest in step}) == 39
    return steps


def test_pixels_and_labels_are_the_references(shard_set: Path) -> None:
    """Decode, cut, mirror, shift: within a gray level everywhere, and labels exactly."""
    images, labels = stored(shard_set, "train")
    plan = Plan(TRAIN, 13, SEED, color_matrix(read_dataset(shard_set).rgb))
    steps = [data.training(3, 0) for data in workers(shard_set, 3, 4, 2)]
    for planned, parts in zip(plan.epoch(3), zip(*steps, strict=True), strict=True):
        drawn = planned.draw(planned.samples)
        batches = [batch for micro_batches in parts for batch in micro_batches]
        got = torch.cat([batch.images for batch in batches])
        assert torch.cat([batch.labels for batch in batches]).tolist() == [labels[s] for s in planned.samples]
        for row, (sample, (top, left)) in enumerate(zip(planned.samples, drawn.crops, strict=True)):
            window = images[sample][top : top + 227, left : left + 227]
            window = window[:, ::-1] if drawn.flips[row] else window
            assert_pixels(got[row], window + drawn.shifts[row].astype(np.float64), shard_set)


@pytest.mark.parametrize(("world", "micro_batch", "threads"), [(1, 5, 2), (3, 13, 1), (5, 1, 2)])
def test_the_stream_is_the_same_for_any_workers_micro_batches_and_threads(
    shard_set: Path, whole: Steps, world: int, micro_batch: int, threads: int
) -> None:
    assert stream(workers(shard_set, world, micro_batch, threads), 3) == whole


def test_a_run_stopped_at_any_step_and_resumed_by_others_goes_on_in_the_same_stream(
    shard_set: Path, one: list[WorkerData], whole: Steps
) -> None:
    """Nothing of the last run is left in the loaders, nor of one that was left in the middle."""
    two, three = workers(shard_set, 2, 4), workers(shard_set, 3, 2, 2)
    for stopped in (1, 3):
        for data in two:
            next(iter(data.training(0, 0)))
            next(iter(data.validation()))
        assert stream(two, 3, 0, stopped) + stream(three, 3, stopped) == whole
        # On into the next epoch, and back.
        assert stream(three, 4) == stream(one, 4)
        assert stream(three, 3) == whole


def test_the_next_epoch_is_read_while_the_network_validates_and_none_beyond_the_last(
    shard_set: Path, whole: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the batches that are read ahead on, training and validation share the decoder."""
    (data,) = workers(shard_set, 1, 13)
    read: list[list[int]] = []
    submit = ReaderProcess.submit

    def noted(self: ReaderProcess, slot: int, planned: PlannedBatch) -> None:
        read.append(planned.samples.tolist())
        submit(self, slot, planned)

    monkeypatch.setattr(ReaderProcess, "submit", noted)
    assert len(list(data.training(2, 0))) == 3
    plan = Plan(TRAIN, 13, SEED, color_matrix(read_dataset(shard_set).rgb))
    # An epoch of this set is one group for DALI.
    following = np.concatenate([planned.samples for planned in plan.epoch(3)]).tolist()
    assert following in read
    assert sum(len(batch) for batch in data.validation()) == VAL
    assert stream([data], 3) == whole
    assert read.count(following) == 1
    assert len(list(data.training(4, 0))) == 3
    assert next(data._batches, None) is None


def test_validation_has_each_image_once_and_its_center(shard_set: Path) -> None:
    images, labels = stored(shard_set, "val")
    seen = []
    for data in workers(shard_set, 3, 2):
        for batch in data.validation():
            for image, label, sample in zip(batch.images, batch.labels, batch.samples, strict=True):
                seen.append(int(sample))
                assert int(label) == labels[sample]
                assert_pixels(image, images[sample][14 : 14 + 227, 14 : 14 + 227], shard_set)
    assert seen == list(range(VAL))
    # The first of more workers than images.
    idle = WorkerData(shard_set, Recipe(batch_size=16), Worker(0, 16, torch.device("cpu")), 5, 1)
    assert list(idle.validation()) == []
