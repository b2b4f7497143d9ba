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


def workers(shard_set: Path, batch_size: int, world: int, micro_batch: int, threads: int = 1) -> list[WorkerData]:
    """All ranks' data, as each of them would open it."""
    recipe = Recipe(batch_size=batch_size, seed=SEED)
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


def mean_level(shard_set: Path) -> NDArray[np.float64]:
    return np.array(read_dataset(shard_set).rgb.mean) * 255


@pytest.fixture(scope="module")
def whole(shard_set: Path) -> Steps:
    """Epoch 3 in steps of 13, by one worker with one thread and whole batches."""
    return stream(workers(shard_set, 13, 1, 13), 3)


@pytest.mark.parametrize(("epoch", "world"), [(0, 1), (3, 3)])
def test_pixels_and_labels_are_the_references(shard_set: Path, epoch: int, world: int) -> None:
    """Decode, cut, mirror, shift: within a gray level everywhere, and labels exactly."""
    images, labels = stored(shard_set, "train")
    plan = Plan(TRAIN, 13, SEED, color_matrix(read_dataset(shard_set).rgb))
    steps = [data.training(epoch, 0) for data in workers(shard_set, 13, world, 4, 2)]
    for planned, parts in zip(plan.epoch(epoch), zip(*steps, strict=True), strict=True):
        drawn = planned.draw(planned.samples)
        batches = [batch for micro_batches in parts for batch in micro_batches]
        got = torch.cat([batch.images for batch in batches]).numpy()
        assert torch.cat([batch.labels for batch in batches]).tolist() == [labels[s] for s in planned.samples]
        for row, (sample, (top, left)) in enumerate(zip(planned.samples, drawn.crops, strict=True)):
            window = images[sample][top : top + 227, left : left + 227]
            window = window[:, ::-1] if drawn.flips[row] else window
            expected = window - mean_level(shard_set) + drawn.shifts[row].astype(np.float64)
            assert np.abs(got[row] - expected.transpose(2, 0, 1)).max() <= 1


@pytest.mark.parametrize(
    ("world", "micro_batch", "threads"),
    [(1, 5, 2), (2, 3, 2), (3, 13, 1), (7, 1, 2)],
)
def test_the_stream_is_the_same_for_any_workers_micro_batches_and_threads(
    shard_set: Path, whole: Steps, world: int, micro_batch: int, threads: int
) -> None:
    assert stream(workers(shard_set, 13, world, micro_batch, threads), 3) == whole
    assert [len(step) for step in whole] == [13, 13, 13]


@pytest.mark.parametrize("stopped", [1, 3])
def test_a_run_stopped_at_any_step_and_resumed_by_others_goes_on_in_the_same_stream(
    shard_set: Path, whole: Steps, stopped: int
) -> None:
    before = stream(workers(shard_set, 13, 2, 4), 3, 0, stopped)
    resumed = workers(shard_set, 13, 3, 2, 2)
    assert before + stream(resumed, 3, stopped) == whole
    # The same loaders go on into the next epoch, and back, as nothing of the last run is left in them.
    assert stream(resumed, 4) == stream(workers(shard_set, 13, 1, 13), 4)
    assert stream(resumed, 3) == whole


def test_a_run_left_in_the_middle_leaves_nothing_in_its_loaders(shard_set: Path, whole: Steps) -> None:
    ranks = workers(shard_set, 13, 2, 2)
    for data in ranks:
        next(iter(data.training(0, 0)))
        next(iter(data.validation()))
    assert stream(ranks, 3) == whole


def test_the_next_epoch_is_read_while_the_network_validates(
    shard_set: Path, whole: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the batches that are read ahead on, training and validation share the decoder."""
    (data,) = workers(shard_set, 13, 1, 13)
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


def test_nothing_is_read_beyond_the_last_epoch(shard_set: Path) -> None:
    recipe = Recipe(batch_size=13, seed=SEED, epochs=2)
    data = WorkerData(shard_set, recipe, Worker(0, 1, torch.device("cpu")), 13, 1)
    assert [len(list(data.training(epoch, 0))) for epoch in range(2)] == [3, 3]
    assert next(data._batches, None) is None


@pytest.mark.parametrize(("batch_size", "world"), [(45, 1), (22, 4)])
def test_an_epoch_has_each_sample_once_but_for_its_tail(shard_set: Path, batch_size: int, world: int) -> None:
    ranks = workers(shard_set, batch_size, world, 4)
    tails = []
    for epoch in range(2):
        samples = [b.samples for data in ranks for step in data.training(epoch, 0) for b in step]
        found = np.concatenate(samples).tolist()
        assert len(found) == len(set(found)) == TRAIN // batch_size * batch_size
        assert set(found) <= set(range(TRAIN))
        tails.append(set(range(TRAIN)) - set(found))
    assert tails[0] != tails[1] or not tails[0]


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 4), (3, 2), (16, 5)])
def test_validation_has_each_image_once_and_its_center(shard_set: Path, world: int, micro_batch: int) -> None:
    """For 16 workers too, one of which has no image."""
    images, labels = stored(shard_set, "val")
    seen = []
    for data in workers(shard_set, 16, world, micro_batch):
        for batch in data.validation():
            for image, label, sample in zip(batch.images, batch.labels, batch.samples, strict=True):
                seen.append(int(sample))
                assert int(label) == labels[sample]
                expected = images[sample][14 : 14 + 227, 14 : 14 + 227] - mean_level(shard_set)
                assert np.abs(image.numpy() - expected.transpose(2, 0, 1)).max() <= 1
    assert seen == list(range(VAL))


def test_another_seed_another_epoch_and_another_batch_size_are_other_streams(shard_set: Path, whole: Steps) -> None:
    """So that equal digests above mean something: no image of one is an image of another."""
    other = WorkerData(shard_set, Recipe(batch_size=13, seed=SEED + 1), Worker(0, 1, torch.device("cpu")), 13, 1)
    flat = {digest for step in whole for digest in step}
    assert len(flat) == 39
    assert not flat & {digest for step in stream([other], 3) for digest in step}
    assert not flat & {digest for step in stream(workers(shard_set, 13, 1, 13), 4) for digest in step}
    # A batch of another size cuts the same order elsewhere: the same views, but for the tail.
    regrouped = [digest for step in stream(workers(shard_set, 20, 1, 20), 3) for digest in step]
    assert regrouped[:39] == [digest for step in whole for digest in step]
