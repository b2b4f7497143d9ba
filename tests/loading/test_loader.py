"""DALI's batches against Pillow and numpy executing the same plan."""

from __future__ import annotations

import functools
import gc
import io
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image

from pipeline.dataset.info import DatasetError, read_dataset
from pipeline.dataset.split_reader import Allocate, SplitReader
from pipeline.loading.graph import PREFETCH
from pipeline.loading.loader import AHEAD, GROUP, READERS, Loader, LoaderError
from pipeline.loading.plan import TEN_CROPS, Augmentation, Plan, PlannedBatch, center_crops, color_matrix
from pipeline.loading.reader_process import ReaderProcessError
from pipeline.staging.decoded_cache import stage_pixels
from tests.damage import OtherImages
from tests.processes import below

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def reader(shard_set: Path) -> SplitReader:
    return SplitReader(shard_set, read_dataset(shard_set), "train")


@pytest.fixture(scope="module")
def loader(shard_set: Path, reader: SplitReader) -> Loader:
    return Loader(reader, read_dataset(shard_set).rgb, 40, CPU, 2)


def reference(reader: SplitReader, mean: NDArray[np.float64], planned: PlannedBatch) -> NDArray[np.float64]:
    """float64 [n, 3, 227, 227]: decode, crop, flip, subtract the mean, add the color jitter."""
    rows = []
    drawn = planned.draw(planned.samples)
    for sample, (top, left), flip, shift in zip(planned.samples, drawn.crops, drawn.flips, drawn.shifts, strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(reader.image(sample).tobytes())), np.float64)
        window = pixels[top : top + 227, left : left + 227]
        window = window[:, ::-1] if flip else window
        rows.append((window - mean + shift.astype(np.float64)).transpose(2, 0, 1))
    return np.stack(rows)


def test_training_batches_are_the_plans(shard_set: Path, reader: SplitReader, loader: Loader) -> None:
    rgb = read_dataset(shard_set).rgb
    plan = Plan(len(reader), 20, 7, color_matrix(rgb))
    for epoch in range(2):
        steps = list(plan.epoch(epoch))
        batches = list(loader.run(steps))
        assert len(batches) == plan.steps == 2
        for planned, batch in zip(steps, batches, strict=True):
            expected = reference(reader, np.array(rgb.mean) * 255, planned)
            np.testing.assert_allclose(batch.images.numpy(), expected, rtol=0, atol=1e-4)
            np.testing.assert_array_equal(batch.samples, planned.samples)
            np.testing.assert_array_equal(batch.labels.numpy(), reader.labels[planned.samples])
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
            assert batch.images.dtype == torch.float32


def given(augmentation: Augmentation, samples: NDArray[np.int64]) -> Augmentation:
    return augmentation


def fixed(samples: NDArray[np.int64], crops: NDArray[np.int64], flips: NDArray[np.bool_]) -> PlannedBatch:
    """A batch with these crops, whole, and no color jitter."""
    augmentation = Augmentation(crops, flips, np.zeros((len(samples), 3), np.float32))
    return PlannedBatch(samples, functools.partial(given, augmentation))


def test_every_crop_position_is_cut_exactly(shard_set: Path, reader: SplitReader, loader: Loader) -> None:
    mean = np.array(read_dataset(shard_set).rgb.mean) * 255
    offsets = np.arange(30)
    planned = fixed(np.zeros(30, np.int64), np.stack([offsets, offsets[::-1]], axis=1), offsets % 2 == 1)
    (batch,) = loader.run([planned])
    np.testing.assert_allclose(batch.images.numpy(), reference(reader, mean, planned), rtol=0, atol=1e-4)


def test_ten_crops_of_each_image(shard_set: Path, reader: SplitReader) -> None:
    rgb = read_dataset(shard_set).rgb
    ten = Loader(reader, rgb, 40, CPU, 2, ten_crop=True)
    samples = np.array([3, 1])
    (batch,) = ten.run([center_crops(samples)])
    crops = np.array([(top, left) for top, left, _ in TEN_CROPS] * 2)
    planned = fixed(np.repeat(samples, 10), crops, np.array([flip for _, _, flip in TEN_CROPS] * 2))
    expected = reference(reader, np.array(rgb.mean) * 255, planned)
    np.testing.assert_allclose(batch.images.numpy(), expected, rtol=0, atol=1e-4)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.samples.tolist() == [3, 1]
    assert batch.labels.tolist() == np.repeat(reader.labels[samples], 10).tolist()
    np.testing.assert_array_equal(batch.images[5:10].numpy(), batch.images[:5].flip(3).numpy())


def test_ten_crops_are_the_same_from_pixels(shard_set: Path, reader: SplitReader, tmp_path: Path) -> None:
    staged = stage_pixels(str(shard_set), tmp_path, lambda _: None, 1)
    rgb = read_dataset(shard_set).rgb
    pixels = SplitReader(staged, read_dataset(staged), "train")
    runs = [
        Loader(r, rgb, 7, CPU, 2, ten_crop=True).run(center_crops(np.arange(20)).chunks(7)) for r in (reader, pixels)
    ]
    for one, two in zip(*runs, strict=True):
        assert torch.equal(one.images, two.images)


def test_a_shorter_last_batch_and_an_abandoned_run(reader: SplitReader, loader: Loader) -> None:
    samples = np.arange(len(reader))
    next(loader.run(center_crops(samples).chunks(5)))
    batches = list(loader.run(center_crops(samples).chunks(40)))
    assert [len(batch) for batch in batches] == [40, 5]
    np.testing.assert_array_equal(np.concatenate([batch.samples for batch in batches]), samples)
    # All batches but the end of the source were taken: DALI has seen that end, the caller has not.
    run = loader.run(center_crops(samples).chunks(40))
    next(run)
    next(run)
    assert [len(batch) for batch in loader.run(center_crops(samples).chunks(9))] == [9] * 5


def test_a_group_holds_batches_of_one_epoch_and_any_length(
    shard_set: Path, reader: SplitReader, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether batches are decoded together changes none of them, nor does a run that ends within a group."""
    plan = Plan(len(reader), 14, 3, color_matrix(read_dataset(shard_set).rgb))
    planned = [part for epoch in range(3) for whole in plan.epoch(epoch) for part in whole.chunks(6)]
    together = list(loader.run(planned))
    monkeypatch.setattr("pipeline.loading.loader.GROUP", 1)
    alone = list(Loader(reader, read_dataset(shard_set).rgb, 6, CPU, 1).run(planned))
    assert [len(batch) for batch in alone] == [6, 6, 2] * 9
    next(loader.run(planned))
    for batches in (together, loader.run(planned)):
        for one, two in zip(batches, alone, strict=True):
            np.testing.assert_array_equal(one.samples, two.samples)
            assert torch.equal(one.images, two.images)
            assert torch.equal(one.labels, two.labels)


def turned(jpeg: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """The same image with an orientation in its EXIF, a segment after the marker that begins the file."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    fields, data = exif.tobytes(), jpeg.tobytes()
    with_exif = data[:2] + b"\xff\xe1" + (len(fields) + 2).to_bytes(2, "big") + fields + data[2:]
    assert Image.open(io.BytesIO(with_exif)).getexif()[ExifTags.Base.Orientation] == orientation
    return np.frombuffer(with_exif, np.uint8)


def test_exif_orientation_is_not_applied(shard_set: Path, reader: SplitReader) -> None:
    rgb = read_dataset(shard_set).rgb
    planned = fixed(np.arange(16), np.tile([[2, 27]], (16, 1)), np.zeros(16, np.bool_))
    others = OtherImages(reader, {sample: turned(reader.image(sample), sample % 8 + 1) for sample in range(16)})
    (batch,) = Loader(others, rgb, 16, CPU, 1).run([planned])
    expected = reference(reader, np.array(rgb.mean) * 255, planned)
    np.testing.assert_allclose(batch.images.numpy(), expected, rtol=0, atol=1e-4)


def threads_and_memory() -> tuple[int, int]:
    """This process's threads, and the bytes it holds in memory, as the kernel counts them."""
    status = dict(re.findall(r"^(\w+):\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE))
    return int(status["Threads"]), 1024 * int(status["VmRSS"])


def test_a_dropped_loader_leaves_no_thread_no_process_and_no_memory(shard_set: Path, reader: SplitReader) -> None:
    rgb = read_dataset(shard_set).rgb
    before, _ = threads_and_memory()
    processes, files = below(os.getpid()), len(os.listdir("/proc/self/fd"))

    def build_and_drop(runs: int) -> None:
        loader = Loader(reader, rgb, 20, CPU, 2)
        for _ in range(runs):
            next(loader.run(center_crops(np.arange(40)).chunks(20)))

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
    # Loaders of other tests may end meanwhile, and theirs with them.
    assert below(os.getpid()).keys() <= processes.keys()
    assert len(os.listdir("/proc/self/fd")) <= files


@pytest.mark.parametrize("samples", [(8,), tuple(range(5, 10))])
def test_an_image_that_does_not_decode_is_named(shard_set: Path, reader: SplitReader, samples: tuple[int, ...]) -> None:
    """One among others, and a batch that holds no other."""
    others = dict.fromkeys(samples, np.frombuffer(b"GIF89a, and no more", np.uint8))
    damaged = Loader(OtherImages(reader, others), read_dataset(shard_set).rgb, 5, CPU, 1)
    with pytest.raises(LoaderError, match=f"{reader.key(samples[0])}.*it does not decode"):
        list(damaged.run(center_crops(np.arange(20)).chunks(5)))


def test_an_image_too_small_for_its_crop_is_named(shard_set: Path, reader: SplitReader) -> None:
    file = io.BytesIO()
    Image.new("RGB", (300, 200)).save(file, "JPEG")
    smaller = Loader(
        OtherImages(reader, {8: np.frombuffer(file.getvalue(), np.uint8)}), read_dataset(shard_set).rgb, 5, CPU, 1
    )
    with pytest.raises(LoaderError, match=f"{reader.key(8)}.*300 x 200, not 256 x 256"):
        list(smaller.run(center_crops(np.arange(20)).chunks(5)))


def test_another_failure_of_dali_is_not_called_damage(
    shard_set: Path, reader: SplitReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a lack of memory: every image decodes, so that a new worker may fare better."""
    loader = Loader(reader, read_dataset(shard_set).rgb, 5, CPU, 1)
    batches = loader.run(center_crops(np.arange(20)).chunks(5))

    def fails(stream: object = None) -> object:
        raise RuntimeError("CUDA runtime API error cudaErrorMemoryAllocation (2): out of memory")

    monkeypatch.setattr(loader._pipeline, "run", fails)
    with pytest.raises(RuntimeError, match="out of memory") as found:
        next(batches)
    assert not isinstance(found.value, ValueError)


class TellsWho(OtherImages):
    """Cannot be read, and says by whom it was tried."""

    def read(self, samples: NDArray[np.int64], allocate: Allocate) -> NDArray[np.uint8]:
        raise DatasetError(f"process {os.getpid()}")


def tell_who(samples: NDArray[np.int64]) -> Augmentation:
    raise DatasetError(f"process {os.getpid()}")


def test_a_batch_is_read_and_drawn_in_another_process(shard_set: Path, reader: SplitReader) -> None:
    rgb = read_dataset(shard_set).rgb
    for images, draw in ((TellsWho(reader, {}), center_crops(np.arange(5)).draw), (reader, tell_who)):
        with pytest.raises(DatasetError, match=r"^process \d+$") as found:
            list(Loader(images, rgb, 5, CPU, 1).run([PlannedBatch(np.arange(5), draw)]))
        assert str(found.value) != f"process {os.getpid()}"


def test_a_reader_process_that_is_killed_is_no_damage_of_data(shard_set: Path, reader: SplitReader) -> None:
    before = below(os.getpid())
    loader = Loader(reader, read_dataset(shard_set).rgb, 5, CPU, 1)
    batches = loader.run(itertools.repeat(center_crops(np.arange(5))))
    next(batches)
    for child in below(os.getpid()).keys() - before:
        os.kill(child, signal.SIGKILL)
    with pytest.raises(ReaderProcessError, match="killed by signal 9"):
        list(itertools.islice(batches, GROUP // 5 * (PREFETCH + AHEAD + 1)))
    assert not issubclass(ReaderProcessError, ValueError)


LOADER_OF_A_SCRIPT = """
import sys
from pathlib import Path
import numpy as np
import torch
from pipeline.dataset.info import read_dataset
from pipeline.loading.loader import Loader
from pipeline.loading.plan import center_crops
from pipeline.dataset.split_reader import SplitReader

root = Path(sys.argv[1])
reader = SplitReader(root, read_dataset(root), "train")
loader = Loader(reader, read_dataset(root).rgb, 5, torch.device("cpu"), 1)
next(loader.run([center_crops(np.arange(5))]))
print("ready", flush=True)
sys.stdin.read()
"""


def test_readers_end_with_a_process_that_is_killed(shard_set: Path) -> None:
    command = [sys.executable, "-c", LOADER_OF_A_SCRIPT, str(shard_set)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as script:  # type: ignore[call-overload]
        assert script.stdout.readline() == b"ready\n"
        readers = below(script.pid)
        assert len(readers) == READERS
        script.kill()
    deadline = time.monotonic() + 30.0
    # Orphans are the first process's.
    while (running := readers.keys() & below(1)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not running


def test_no_more_is_read_ahead_than_is_said(
    shard_set: Path, reader: SplitReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches are planned when they are read, so an endless plan takes no memory."""
    planned: list[int] = []

    def endless() -> Iterator[PlannedBatch]:
        for number in itertools.count():
            planned.append(number)
            yield center_crops(np.arange(5))

    monkeypatch.setattr("pipeline.loading.loader.GROUP", 10)
    loader = Loader(reader, read_dataset(shard_set).rgb, 5, CPU, 1)
    for number, _ in enumerate(itertools.islice(loader.run(endless()), 40), start=1):
        # Of the group that comes next, one batch is known: it did not fit any more.
        assert len(planned) <= 2 * (-(-number // 2) + PREFETCH + AHEAD) + 1
