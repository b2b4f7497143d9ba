"""DALI's batches against Pillow and numpy executing the same plan."""

from __future__ import annotations

import dataclasses
import gc
import io
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image

from pipeline.dataset import read_dataset
from pipeline.loader import Loader, LoaderError
from pipeline.plan import Plan, Views, centre_views, colour_matrix, ten_crop_views
from pipeline.split_reader import SplitReader
from tests.damage import OtherImages

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def reader(shard_set: Path) -> SplitReader:
    return SplitReader(shard_set, read_dataset(shard_set), "train")


@pytest.fixture(scope="module")
def loader(shard_set: Path, reader: SplitReader) -> Loader:
    return Loader(reader, read_dataset(shard_set).rgb, 40, CPU, 2)


def reference(reader: SplitReader, mean: NDArray[np.float64], views: Views) -> NDArray[np.float64]:
    """float64 [n, 3, 227, 227]: decode, cut, mirror, subtract the mean, add the shift."""
    rows = []
    for sample, (top, left), flip, shift in zip(views.samples, views.crops, views.flips, views.shifts, strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(reader.image(sample).tobytes())), np.float64)
        window = pixels[top : top + 227, left : left + 227]
        window = window[:, ::-1] if flip else window
        rows.append((window - mean + shift.astype(np.float64)).transpose(2, 0, 1))
    return np.stack(rows)


def test_training_batches_are_the_plans(shard_set: Path, reader: SplitReader, loader: Loader) -> None:
    rgb = read_dataset(shard_set).rgb
    plan = Plan(len(reader), 20, 7, colour_matrix(rgb))
    for epoch in range(2):
        steps = list(plan.epoch(epoch))
        batches = list(loader.run(steps))
        assert len(batches) == plan.steps == 2
        for views, batch in zip(steps, batches, strict=True):
            expected = reference(reader, np.array(rgb.mean) * 255, views)
            np.testing.assert_allclose(batch.images.numpy(), expected, rtol=0, atol=1e-4)
            np.testing.assert_array_equal(batch.samples, views.samples)
            np.testing.assert_array_equal(batch.labels.numpy(), reader.labels[views.samples])
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
            assert batch.images.dtype == torch.float32


def test_every_window_position_is_cut_exactly(shard_set: Path, reader: SplitReader, loader: Loader) -> None:
    mean = np.array(read_dataset(shard_set).rgb.mean) * 255
    offsets = np.arange(30)
    views = Views(
        samples=np.zeros(30, np.int64),
        crops=np.stack([offsets, offsets[::-1]], axis=1),
        flips=offsets % 2 == 1,
        shifts=np.zeros((30, 3), np.float32),
    )
    (batch,) = loader.run([views])
    np.testing.assert_allclose(batch.images.numpy(), reference(reader, mean, views), rtol=0, atol=1e-4)


def test_ten_crops(shard_set: Path, reader: SplitReader, loader: Loader) -> None:
    views = ten_crop_views(np.array([3, 1]))
    (batch,) = loader.run([views])
    mean = np.array(read_dataset(shard_set).rgb.mean) * 255
    np.testing.assert_allclose(batch.images.numpy(), reference(reader, mean, views), rtol=0, atol=1e-4)
    five, mirrored = batch.images[:5], batch.images[5:10]
    np.testing.assert_array_equal(mirrored.numpy(), five.flip(3).numpy())


def test_a_shorter_last_batch_and_an_abandoned_run(reader: SplitReader, loader: Loader) -> None:
    samples = np.arange(len(reader))
    next(loader.run(centre_views(samples).chunks(5)))
    batches = list(loader.run(centre_views(samples).chunks(40)))
    assert [len(batch) for batch in batches] == [40, 5]
    np.testing.assert_array_equal(np.concatenate([batch.samples for batch in batches]), samples)
    # All batches but the end of the source were taken: DALI has seen that end, the caller has not.
    run = loader.run(centre_views(samples).chunks(40))
    next(run)
    next(run)
    assert [len(batch) for batch in loader.run(centre_views(samples).chunks(9))] == [9] * 5


def test_decoder_threads_do_not_change_the_stream(shard_set: Path, reader: SplitReader, loader: Loader) -> None:
    alone = Loader(reader, read_dataset(shard_set).rgb, 40, CPU, 1)
    views = Plan(len(reader), 15, 2, np.eye(3)).epoch(0)
    for one, two in zip(alone.run(views), loader.run(Plan(len(reader), 15, 2, np.eye(3)).epoch(0)), strict=True):
        assert torch.equal(one.images, two.images)


class TurnedReader:
    """The same images, each with an EXIF orientation, 1 to 8 in turn."""

    def __init__(self, reader: SplitReader) -> None:
        self._reader = reader
        self.split, self.labels, self.key = reader.split, reader.labels, reader.key

    def image(self, sample: int) -> NDArray[np.uint8]:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = int(sample) % 8 + 1
        fields = exif.tobytes()
        # The EXIF segment after the marker that begins the file.
        segment = b"\xff\xe1" + (len(fields) + 2).to_bytes(2, "big") + fields
        data = self._reader.image(sample).tobytes()
        return np.frombuffer(data[:2] + segment + data[2:], np.uint8)


def test_exif_orientation_is_not_applied(shard_set: Path, reader: SplitReader) -> None:
    turned = TurnedReader(reader)
    with Image.open(io.BytesIO(turned.image(5).tobytes())) as image:
        assert image.getexif()[ExifTags.Base.Orientation] == 6
    rgb = read_dataset(shard_set).rgb
    views = centre_views(np.arange(16))
    views = dataclasses.replace(views, crops=np.tile([[2, 27]], (16, 1)))
    (batch,) = Loader(turned, rgb, 16, CPU, 1).run([views])  # type: ignore[arg-type]
    expected = reference(reader, np.array(rgb.mean) * 255, views)
    np.testing.assert_allclose(batch.images.numpy(), expected, rtol=0, atol=1e-4)


def threads_and_memory() -> tuple[int, int]:
    """This process's threads, and the bytes it holds in memory, as the kernel counts them."""
    status = dict(re.findall(r"^(\w+):\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE))
    return int(status["Threads"]), 1024 * int(status["VmRSS"])


def test_a_dropped_loader_leaves_no_thread_and_no_memory(shard_set: Path, reader: SplitReader) -> None:
    rgb = read_dataset(shard_set).rgb
    before, _ = threads_and_memory()

    def build_and_drop(runs: int) -> None:
        loader = Loader(reader, rgb, 20, CPU, 2)
        for _ in range(runs):
            next(loader.run(centre_views(np.arange(40)).chunks(20)))

    gc.disable()  # Dropping must do, without waiting for Python to look for cycles.
    try:
        for _ in range(3):
            build_and_drop(2)
        _, memory = threads_and_memory()
        for number in range(20):
            build_and_drop(number % 3)
        threads, grown = threads_and_memory()
    finally:
        gc.enable()
    # The kernel counts a thread that was waited for a moment longer.
    deadline = time.monotonic() + 10.0
    while threads > before and time.monotonic() < deadline:
        threads, _ = threads_and_memory()
    assert threads <= before
    # Had each that ran left a batch behind, it would be 161 MB; blocks that malloc keeps are allowed.
    assert grown - memory < 100e6


def test_an_image_that_does_not_decode_is_named(shard_set: Path, reader: SplitReader) -> None:
    whole = reader.image(8)
    damaged = Loader(OtherImages(reader, {8: whole[: len(whole) // 3]}), read_dataset(shard_set).rgb, 10, CPU, 1)  # type: ignore[arg-type]
    with pytest.raises(LoaderError, match=reader.key(8)):
        list(damaged.run(centre_views(np.arange(20)).chunks(10)))


@pytest.mark.parametrize("samples", [(8,), tuple(range(5, 10))])
def test_an_image_of_another_size_is_named(shard_set: Path, reader: SplitReader, samples: tuple[int, ...]) -> None:
    """One among others, and a batch that holds no other."""
    file = io.BytesIO()
    Image.new("RGB", (300, 280)).save(file, "JPEG")
    others = dict.fromkeys(samples, np.frombuffer(file.getvalue(), np.uint8))
    larger = Loader(OtherImages(reader, others), read_dataset(shard_set).rgb, 5, CPU, 1)  # type: ignore[arg-type]
    with pytest.raises(LoaderError, match=f"{reader.key(samples[0])}.*300 x 280, not 256 x 256"):
        list(larger.run(centre_views(np.arange(20)).chunks(5)))
