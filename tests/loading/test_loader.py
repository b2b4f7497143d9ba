"""DALI's batches against Pillow and numpy executing the same plan."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.dataset.info import DatasetError, read_dataset
from pipeline.dataset.split_reader import SplitReader
from pipeline.images.rgb_stats import RgbStatistics
from pipeline.loading.loader import Loader, LoaderError
from pipeline.loading.plan import TEN_CROPS, Augmentation, Plan, PlannedBatch, center_crops, color_matrix
from tests.damage import OtherImages
from tests.photographs import decoded, encoded

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rgb(shard_set: Path) -> RgbStatistics:
    return read_dataset(shard_set).rgb


@pytest.fixture(scope="module")
def reader(shard_set: Path) -> SplitReader:
    return SplitReader(shard_set, read_dataset(shard_set), "train")


@pytest.fixture(scope="module")
def loader(reader: SplitReader, rgb: RgbStatistics) -> Loader:
    return Loader(reader, rgb, 40, CPU, 2)


def reference(reader: SplitReader, rgb: RgbStatistics, planned: PlannedBatch) -> NDArray[np.float64]:
    """float64 [n, 3, 227, 227]: decode, crop, flip, subtract the mean, add the color jitter."""
    rows = []
    drawn, mean = planned.draw(planned.samples), np.array(rgb.mean) * 255
    for sample, (top, left), flip, shift in zip(planned.samples, drawn.crops, drawn.flips, drawn.shifts, strict=True):
        pixels = decoded(reader.image(sample).tobytes()).astype(np.float64)
        window = pixels[top : top + 227, left : left + 227]
        window = window[:, ::-1] if flip else window
        rows.append((window - mean + shift.astype(np.float64)).transpose(2, 0, 1))
    return np.stack(rows)


def test_training_batches_are_the_plans(reader: SplitReader, rgb: RgbStatistics, loader: Loader) -> None:
    plan = Plan(len(reader), 20, 7, color_matrix(rgb))
    steps = [*plan.epoch(0), *plan.epoch(1)]
    for planned, batch in zip(steps, loader.run(steps), strict=True):
        np.testing.assert_allclose(batch.images.numpy(), reference(reader, rgb, planned), rtol=0, atol=1e-4)
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


def test_every_crop_position_is_cut_exactly(reader: SplitReader, rgb: RgbStatistics, loader: Loader) -> None:
    offsets = np.arange(30)
    planned = fixed(np.zeros(30, np.int64), np.stack([offsets, offsets[::-1]], axis=1), offsets % 2 == 1)
    (batch,) = loader.run([planned])
    np.testing.assert_allclose(batch.images.numpy(), reference(reader, rgb, planned), rtol=0, atol=1e-4)


def test_ten_crops_of_each_image(reader: SplitReader, rgb: RgbStatistics) -> None:
    samples = np.array([3, 1])
    (batch,) = Loader(reader, rgb, 40, CPU, 2, ten_crop=True).run([center_crops(samples)])
    crops = np.array([(top, left) for top, left, _ in TEN_CROPS] * 2)
    planned = fixed(np.repeat(samples, 10), crops, np.array([flip for _, _, flip in TEN_CROPS] * 2))
    np.testing.assert_allclose(batch.images.numpy(), reference(reader, rgb, planned), rtol=0, atol=1e-4)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.samples.tolist() == [3, 1]
    assert batch.labels.tolist() == np.repeat(reader.labels[samples], 10).tolist()


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
    reader: SplitReader, rgb: RgbStatistics, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether batches are decoded together changes none of them, nor does a run that ends within a group."""
    plan = Plan(len(reader), 14, 3, color_matrix(rgb))
    planned = [part for epoch in range(3) for whole in plan.epoch(epoch) for part in whole.chunks(6)]
    next(loader.run(planned))
    together = list(loader.run(planned))
    monkeypatch.setattr("pipeline.loading.loader.GROUP", 1)
    alone = list(Loader(reader, rgb, 6, CPU, 1).run(planned))
    assert [len(batch) for batch in alone] == [6, 6, 2] * 9
    for one, two in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one.samples, two.samples)
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.labels, two.labels)
        # As torch's own memory is: a kernel may be chosen by it. 6 images of 618,348 bytes are no multiple.
        assert one.images.data_ptr() % 64 == 0


@pytest.mark.parametrize(
    ("samples", "image", "what"),
    [
        ((8,), b"GIF89a, and no more", "it does not decode"),
        # A batch that holds no other.
        (tuple(range(5, 10)), b"GIF89a, and no more", "it does not decode"),
        ((8,), encoded(Image.new("RGB", (300, 200))), "300 x 200, not 256 x 256"),
    ],
)
def test_an_image_that_is_not_one_of_a_set_is_named(
    reader: SplitReader, rgb: RgbStatistics, samples: tuple[int, ...], image: bytes, what: str
) -> None:
    others = OtherImages(reader, dict.fromkeys(samples, np.frombuffer(image, np.uint8)))
    with pytest.raises(LoaderError, match=f"{reader.key(samples[0])}.*{what}"):
        list(Loader(others, rgb, 5, CPU, 1).run(center_crops(np.arange(20)).chunks(5)))


def test_another_failure_of_dali_is_not_called_damage(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a lack of memory: every image decodes, so that a new worker may fare better."""

    def fails(stream: object = None) -> object:
        raise RuntimeError("CUDA runtime API error cudaErrorMemoryAllocation (2): out of memory")

    batches = loader.run(center_crops(np.arange(20)).chunks(5))
    monkeypatch.setattr(loader._pipeline, "run", fails)
    with pytest.raises(RuntimeError, match="out of memory") as found:
        next(batches)
    assert not isinstance(found.value, DatasetError)


class Event:
    """A place in a GPU's queue."""

    done = False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = True


class Stream:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def record_event(self) -> Event:
        self.events.append(Event())
        return self.events[-1]


@pytest.mark.parametrize("far_behind", [False, True])
def test_a_batchs_host_memory_is_kept_until_the_gpu_has_read_it(
    reader: SplitReader, rgb: RgbStatistics, loader: Loader, monkeypatch: pytest.MonkeyPatch, far_behind: bool
) -> None:
    """The GPU's way of handing over, with stand-ins for its stream and for events that are done when they are told.

    Or, of a GPU far behind, only when they are waited for.
    """
    planned = list(Plan(45, 5, 3, color_matrix(rgb)).epoch(0))
    expected = list(loader.run(planned))
    monkeypatch.setattr("pipeline.loading.loader.GROUP", 5)
    views: list[torch.Tensor] = []

    def viewed(output: Any, device: object) -> torch.Tensor:
        views.append(torch.from_dlpack(output))
        return views[-1]

    on_gpu, stream = Loader(reader, rgb, 5, CPU, 1), Stream()
    run = on_gpu._pipeline.run
    monkeypatch.setattr(on_gpu, "_on_gpu", True)
    monkeypatch.setattr(on_gpu._pipeline, "run", lambda stream=None: run())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch, "as_tensor", viewed)
    used: list[int] = []
    for number, (batch, right) in enumerate(zip(on_gpu.run(planned), expected, strict=True)):
        assert torch.equal(batch.images, right.images)
        assert torch.equal(batch.labels, right.labels)
        # DALI's memory is another group's once DALI runs again.
        assert batch.images.data_ptr() != views[-1].data_ptr()
        used.append(on_gpu._copying[-1][1])
        kept = [slot for _, slot in on_gpu._copying]
        assert not set(on_gpu._free) & set(kept)
        if not far_behind:
            # Each event is done two batches later.
            assert used[max(0, number - 2) :] == kept
            stream.events[max(0, number - 2)].done = number >= 2
