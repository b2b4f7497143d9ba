"""Whether a GPU's loader does what the CPU's does, and a training on it what another one did.

From equal pixels, both must give the same batches, bit for bit. From JPEGs, the GPU's images must not depend on how a
plan is cut into batches; its decoder is another one than the CPU's, so these two are compared with a tolerance.

Two correct decoders differ: their inverse DCTs by 1, interpolating chroma rounds once more, and RGB weighs chroma by up
to 1.772, so that blue may differ by 1 + 1.772 * 2 + 0.5, that is 5 levels. Another channel order is beyond that, and so
is chroma that is repeated instead of interpolated.

Two trainings of the same steps must end with the same weights, bit for bit: a resumed run relies on it.
"""

from __future__ import annotations

import dataclasses
import itertools
import resource
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.training import Trainer
from pipeline.dataset.info import read_dataset
from pipeline.dataset.split_reader import Allocate, SplitReader
from pipeline.images.decode import IMAGE_BYTES, IMAGE_SHAPE
from pipeline.loading.graph import GpuDecoder
from pipeline.loading.loader import Batch, Loader
from pipeline.loading.plan import Plan, center_crops, color_matrix
from pipeline.loading.reader_process import Reader

MAX_LEVELS = 5.0  # A value further off than two correct decoders can be...
MAX_BEYOND = 0.001  # ...which this share of an image's values may be.
MAX_MEAN = 1.0  # Mean absolute difference of an image. libjpeg's fast inverse DCT, a poor one, differs by 0.98.
MAX_BIAS = 0.5  # Mean difference of a channel over an image: rounding has no side.
LIMITS = (
    (MAX_MEAN, "levels of mean absolute difference"),
    (MAX_BIAS, "levels of mean difference in a channel"),
    (MAX_BEYOND, f"of its values differ by more than {MAX_LEVELS:g} levels"),
)
TRAINED = 50  # Steps of each of the two trainings.


class GpuCheckError(ValueError):
    """The two loaders do not give the same stream, or two trainings not the same weights."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The worst of every image, in gray levels."""

    images: int
    mean: float
    """Absolute, over all values of all images."""
    worst: tuple[float, ...]
    """What LIMITS are for, of the worst image each."""
    problems: tuple[str, ...]
    """What is out of tolerance, the first image of each kind; none when the streams agree."""

    def __str__(self) -> str:
        worst = ", ".join(f"{value:.4g} {what}" for value, (_, what) in zip(self.worst, LIMITS, strict=True))
        return f"{self.images} images, mean absolute difference {self.mean:.3f} levels; of the worst image {worst}"


def compare(reference: Iterable[Batch], other: Iterable[Batch]) -> Comparison:
    """Compares two streams of the same plan, image by image.

    Args:
        reference: the CPU loader's batches.
        other: the batches to judge, on any device; both must be cut alike.
    """
    problems: dict[str, str] = {}
    rows: list[Tensor] = []  # Of each batch [n, 3]: what LIMITS are for.
    for number, (one, two) in enumerate(itertools.zip_longest(reference, other)):
        if one is None or two is None or len(one) != len(two) or len(one.images) != len(two.images):
            problems["length"] = f"batch {number}: one stream ends, or has fewer images, than the other"
            break
        if not np.array_equal(one.samples, two.samples) or not torch.equal(one.labels.cpu(), two.labels.cpu()):
            problems.setdefault("labels", f"batch {number}: samples or labels differ")
        difference = two.images.float().cpu() - one.images.float().cpu()
        size = difference.abs()
        beyond = (size > MAX_LEVELS).float().mean((1, 2, 3))
        found = torch.stack([size.mean((1, 2, 3)), difference.mean((2, 3)).abs().amax(1), beyond], dim=1)
        rows.append(found)
        for column, (limit, what) in enumerate(LIMITS):
            # Written so that a NaN is out of tolerance too.
            for image in (~(found[:, column] <= limit)).nonzero().flatten().tolist()[:1]:
                sample = int(one.samples[image * len(one) // len(one.images)])
                value = float(found[image, column])
                problems.setdefault(what, f"batch {number}, sample {sample}: {value:.4g} {what} (at most {limit:g})")
    every = torch.cat(rows) if rows else torch.zeros(1, len(LIMITS))
    if not rows:
        problems.setdefault("length", "no image was compared")
    count, mean = sum(map(len, rows)), float(every[:, 0].mean())
    return Comparison(count, mean, tuple(every.amax(0).tolist()), tuple(problems.values()))


class DecodedOnHost:
    """A reader's images, decoded by libjpeg-turbo as they are read: a loader's own decoder has no part in them."""

    pixels = True

    def __init__(self, reader: SplitReader) -> None:
        self._reader = reader
        self.labels, self.describe, self.row_bytes = reader.labels, reader.describe, IMAGE_BYTES
        self.descriptors = reader.descriptors

    def read(self, samples: NDArray[np.int64], allocate: Allocate) -> NDArray[np.uint8]:
        rows = allocate((len(samples), IMAGE_BYTES)).reshape(-1, *IMAGE_SHAPE)
        for row, sample in zip(rows, samples.tolist(), strict=True):
            row[:] = self._reader.decoded(sample)
        return rows


def equal(reference: Iterable[Batch], other: Iterable[Batch]) -> str:
    """Where two streams differ in any bit of an image, a label or a sample, however they are cut; empty if nowhere."""
    one, two = (_rows(batches) for batches in (reference, other))
    for number, (mine, its) in enumerate(itertools.zip_longest(one, two)):
        if mine is None or its is None:
            return f"one stream has {number} images and the other has more"
        for name, a, b in zip(("sample", "label"), mine[1:], its[1:], strict=True):
            if a != b:
                return f"image {number} is of {name} {b}, not {a}"
        if not torch.equal(mine[0], its[0]):
            off = (mine[0] - its[0]).abs()
            return f"image {number}, sample {mine[1]}: {int((off > 0).sum())} values differ, by up to {off.max():g}"
    return ""


def _rows(batches: Iterable[Batch]) -> Iterator[tuple[Tensor, int, int]]:
    """Image, sample and label of each row; of ten crops all ten in one."""
    for batch in batches:
        images = batch.images.cpu().unflatten(0, (len(batch), -1))
        labels = batch.labels.cpu().unflatten(0, (len(batch), -1))[:, 0].tolist()
        yield from zip(images, batch.samples.tolist(), labels, strict=True)


def trained_alike(make_trainer: Callable[[], Trainer], batches: Sequence[Batch], steps: int = TRAINED) -> str:
    """Where two trainings of the same steps differ in any bit of a weight or its momentum; empty if nowhere."""
    one, two = (_trained(make_trainer(), batches, steps) for _ in range(2))
    differ = [name for name, tensor in one.items() if not torch.equal(tensor, two[name])]
    return f"after {steps} steps, {len(differ)} of {len(one)} tensors differ: {', '.join(differ)}" if differ else ""


def _trained(trainer: Trainer, batches: Sequence[Batch], steps: int) -> dict[str, Tensor]:
    for batch in itertools.islice(itertools.cycle(batches), steps):
        trainer.step([batch])
        trainer.progress.step += 1
    state = trainer.optimizer.state
    momentum = {
        f"{name}'s momentum": state[parameter]["momentum_buffer"]
        for name, parameter in trainer.network.named_parameters()
    }
    return {**trainer.network.state_dict(), **momentum}


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How two streams, or trainings, compare."""

    of: str
    found: str
    problems: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class GpuCheck:
    """What the check found."""

    agreements: tuple[Agreement, ...]
    host_mb_grown: float
    """Of this process, over `memory_batches`."""
    device_mb_grown: float
    memory_batches: int

    def lines(self) -> list[str]:
        """What a person reads."""
        memory = f"host {self.host_mb_grown:+.0f} MB, device {self.device_mb_grown:+.0f} MB"
        return [
            *(f"{agreement.of}: {agreement.found}" for agreement in self.agreements),
            f"memory over {self.memory_batches} batches: {memory}",
        ]

    def check_problems(self, device: torch.device) -> None:
        """Raises GpuCheckError if there are any."""
        problems = [f"{one.of}: {problem}" for one in self.agreements for problem in one.problems]
        if problems:
            raise GpuCheckError(f"{device} cannot be relied on: {'; '.join(problems)}")


def check(
    data: Path,
    device: torch.device,
    make_trainer: Callable[[], Trainer],
    batch_size: int,
    steps: int,
    threads: int,
    memory_batches: int = 1000,
    gpu_decoder: GpuDecoder = "cuda",
) -> GpuCheck:
    """Compares a loader on `device` with one on the CPU, over `steps` training batches and as many of center crops.

    Args:
        make_trainer: called twice; gives a new trainer on `device`, with the same initial weights.
    """
    info = read_dataset(data)
    reader = SplitReader(data, info, "train")
    plan = Plan(len(reader), min(batch_size, len(reader)), 0, color_matrix(info.rgb))
    planned = list(itertools.islice(plan.epoch(0), steps))
    batches = [*planned, *(center_crops(batch.samples) for batch in planned)]
    cut = [part for batch in planned for part in batch.chunks(batch_size // 2 + 1)]
    ten = list(center_crops(planned[0].samples).chunks(max(1, batch_size // 10)))

    # A loader takes a second or more to build, so each runs all that it can.
    def loaders(reader: Reader, largest: int, ten_crop: bool = False) -> list[Loader]:
        return [
            Loader(reader, info.rgb, largest, where, threads, ten_crop, gpu_decoder)
            for where in (torch.device("cpu"), device)
        ]

    on_cpu, on_device = loaders(reader, plan.batch_size)
    host_mb, device_mb = memory_growth(on_device, plan, memory_batches, device)
    from_jpegs = compare(on_cpu.run(batches), on_device.run(batches))
    whole = list(on_device.run(planned))
    pixels = DecodedOnHost(reader)
    plain = [loader.run(batches) for loader in loaders(pixels, plan.batch_size)]
    ten_crops = [loader.run(ten) for loader in loaders(pixels, len(ten[0]), ten_crop=True)]
    must_be_equal = {
        "training and center crops, from equal pixels": equal(*plain),
        "ten crops, from equal pixels": equal(*ten_crops),
        "batches of two sizes on the device, from JPEGs": equal(whole, on_device.run(cut)),
        "training twice": trained_alike(make_trainer, whole),
    }
    agreements = [
        Agreement(of, wrong or "equal, bit for bit", (wrong,) if wrong else ()) for of, wrong in must_be_equal.items()
    ]
    agreements.append(Agreement("training and center crops, from JPEGs", str(from_jpegs), from_jpegs.problems))
    return GpuCheck(tuple(agreements), host_mb, device_mb, memory_batches)


def memory_growth(loader: Loader, plan: Plan, count: int, device: torch.device) -> tuple[float, float]:
    """How many MB this process and the device hold more after so many batches than after the first tenth of them."""
    batches = loader.run(plan.endless())
    first = (0.0, 0.0)
    for number, _ in enumerate(itertools.islice(batches, count)):
        if number == count // 10:
            first = _held_mb(device)
    last = _held_mb(device)
    return last[0] - first[0], last[1] - first[1]


def _held_mb(device: torch.device) -> tuple[float, float]:
    """MB that this process holds in memory, and that are taken on the device, by whomever."""
    host = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
    if device.type != "cuda":
        return host, 0.0
    free, total = torch.cuda.mem_get_info(device)
    return host, (total - free) / 1e6
