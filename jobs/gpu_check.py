"""Whether a GPU's loader does what the CPU's does.

Given the same decoded pixels, both must give the same batches, bit for bit: crop, flip, mean and color are exact.
From JPEGs, the GPU's images must not depend on how a plan is cut into batches. Its decoder is another one than the
CPU's, so that these two are compared with a tolerance.

Two correct JPEG decoders differ. Their inverse DCTs may differ by 1, interpolating chroma rounds once more, and the
conversion to RGB weighs chroma by up to 1.772: blue may differ by 1 + 1.772 * 2 + 0.5, that is 5 levels. So values may
differ by 5, one in a thousand by more, and an image by 1 level on average. What this finds: another channel
order, and chroma that is repeated instead of interpolated.
"""

from __future__ import annotations

import dataclasses
import itertools
import resource
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jobs.stages import Findings
from pipeline.dataset import read_dataset
from pipeline.decode import IMAGE_BYTES, IMAGE_SHAPE
from pipeline.graph import GpuDecoder
from pipeline.loader import Batch, Loader
from pipeline.plan import Plan, PlannedBatch, center_crops, colour_matrix
from pipeline.reader_process import Reader
from pipeline.split_reader import Allocate, SplitReader

MAX_LEVELS = 5.0  # A value further off than two correct decoders can be...
MAX_BEYOND = 0.001  # ...which this share of an image's values may be.
MAX_MEAN = 1.0  # Mean absolute difference of an image. libjpeg's fast inverse DCT, a poor one, differs by 0.98.
MAX_BIAS = 0.5  # Mean difference of a channel over an image: rounding has no side.


class GpuCheckError(ValueError):
    """The two loaders do not give the same stream."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The worst of every image, in grey levels."""

    images: int
    mean: float
    """Mean absolute difference over all values of all images."""
    worst_mean: float
    """The largest mean absolute difference of an image."""
    worst_bias: float
    """The largest mean difference of one channel of an image, without its sign."""
    worst_beyond: float
    """The largest share of an image's values that differ by more than MAX_LEVELS."""
    largest: float
    """The largest difference of any value."""
    problems: tuple[str, ...]
    """What is out of tolerance, the first image of each kind; none when the streams agree."""


def compare(reference: Iterable[Batch], other: Iterable[Batch]) -> Comparison:
    """Compares two streams of the same plan, image by image.

    Args:
        reference: the CPU loader's batches.
        other: the batches to judge, on any device; both must be cut alike.
    """
    problems: dict[str, str] = {}
    rows: list[Tensor] = []  # Of each batch [n, 5]: mean, bias, share beyond, largest.
    for number, (one, two) in enumerate(itertools.zip_longest(reference, other)):
        if one is None or two is None or len(one) != len(two) or len(one.images) != len(two.images):
            problems["length"] = f"batch {number}: one stream ends, or has fewer images, than the other"
            break
        if not np.array_equal(one.samples, two.samples) or not torch.equal(one.labels.cpu(), two.labels.cpu()):
            problems.setdefault("labels", f"batch {number}: samples or labels differ")
        difference = two.images.float().cpu() - one.images.float().cpu()
        size = difference.abs()
        found = torch.stack(
            [
                size.mean((1, 2, 3)),
                difference.mean((2, 3)).abs().amax(1),
                (size > MAX_LEVELS).float().mean((1, 2, 3)),
                size.amax((1, 2, 3)),
            ],
            dim=1,
        )
        rows.append(found)
        for column, name, limit in ((0, "mean", MAX_MEAN), (1, "bias", MAX_BIAS), (2, "beyond", MAX_BEYOND)):
            # Written so that a NaN is out of tolerance too.
            for image in (~(found[:, column] <= limit)).nonzero().flatten().tolist()[:1]:
                what = {
                    "mean": "levels of mean absolute difference",
                    "bias": "levels of mean difference in a channel",
                    "beyond": f"of its values differ by more than {MAX_LEVELS:g} levels",
                }[name]
                sample = int(one.samples[image * len(one) // len(one.images)])
                value = float(found[image, column])
                problems.setdefault(name, f"batch {number}, sample {sample}: {value:.4g} {what} (at most {limit:g})")
    every = torch.cat(rows) if rows else torch.zeros(0, 4)
    if not len(every):
        problems.setdefault("length", "no image was compared")
        every = torch.zeros(1, 4)
    mean, bias, beyond, largest = every.amax(0).tolist()
    count = sum(len(row) for row in rows)
    return Comparison(count, float(every[:, 0].mean()), mean, bias, beyond, largest, tuple(problems.values()))


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


@dataclasses.dataclass(frozen=True)
class GpuCheck:
    """What the check found."""

    agrees: dict[str, str]
    """By what was compared: in words, how well it agrees."""
    problems: tuple[str, ...]
    host_mb_grown: float
    """Growth of the process's memory over `memory_batches`."""
    device_mb_grown: float
    """The same of the device's."""
    memory_batches: int

    def lines(self) -> list[str]:
        """What a person reads."""
        memory = f"host {self.host_mb_grown:+.0f} MB, device {self.device_mb_grown:+.0f} MB"
        return [
            *(f"{name}: {words}" for name, words in self.agrees.items()),
            f"memory over {self.memory_batches} batches: {memory}",
        ]

    def row(self, device: str, findings: Findings, gpu_decoder: GpuDecoder) -> str:
        """The device's row of the table in docs/benchmarks.md."""
        rates = findings.rates
        exact = not any("JPEGs" not in problem for problem in self.problems)
        cells = [
            device,
            gpu_decoder,
            f"{rates.loader_images_per_s:,.0f}",
            f"{rates.network_images_per_s:,.0f}",
            f"{rates.train_images_per_s:,.0f}",
            f"{rates.host_us_per_image:.1f}",
            "bit for bit" if exact else "NO",
            f"{self.host_mb_grown:+.0f} | {self.device_mb_grown:+.0f}",
        ]
        return f"| {' | '.join(cells)} |"

    def refuse_problems(self, device: torch.device) -> None:
        """Raises GpuCheckError if there are any."""
        if self.problems:
            raise GpuCheckError(f"the loader on {device} is not the CPU's: {'; '.join(self.problems)}")


def check(
    data: Path,
    device: torch.device,
    batch_size: int,
    steps: int,
    threads: int,
    memory_batches: int = 1000,
    gpu_decoder: GpuDecoder = "cuda",
) -> GpuCheck:
    """Compares a loader on `device` with one on the CPU.

    Args:
        batch_size: images a batch.
        steps: how many batches of each kind are compared.
    """
    info = read_dataset(data)
    train, val = SplitReader(data, info, "train"), SplitReader(data, info, "val")
    plan = Plan(len(train), min(batch_size, len(train)), 0, colour_matrix(info.rgb))
    planned = list(itertools.islice(plan.epoch(0), steps))
    center = list(itertools.islice(center_crops(np.arange(len(val))).chunks(batch_size), steps))
    ten = list(itertools.islice(center_crops(np.arange(len(val))).chunks(max(1, batch_size // 10)), steps))

    def run(
        reader: Reader, batches: list[PlannedBatch], where: torch.device, ten_crop: bool = False
    ) -> Iterator[Batch]:
        largest = max(map(len, batches))
        return Loader(reader, info.rgb, largest, where, threads, ten_crop, gpu_decoder).run(batches)

    cpu = torch.device("cpu")
    kinds = {"training": (train, planned, False), "center crop": (val, center, False), "ten crops": (val, ten, True)}
    agrees, problems = {}, []
    for name, (reader, batches, ten_crop) in kinds.items():
        pixels = DecodedOnHost(reader)
        wrong = equal(run(pixels, batches, cpu, ten_crop), run(pixels, batches, device, ten_crop))
        agrees[f"{name}, from equal pixels"] = wrong or "equal to the CPU's, bit for bit"
        problems += [f"{name}, from equal pixels: {wrong}"] if wrong else []
    cut = [part for batch in planned for part in batch.chunks(batch_size // 2 + 1)]
    wrong = equal(run(train, planned, device), run(train, cut, device))
    agrees["training, in batches of two sizes"] = wrong or "equal, bit for bit"
    problems += [f"training, in batches of two sizes: {wrong}"] if wrong else []
    for name, (reader, batches, ten_crop) in kinds.items():
        found = compare(run(reader, batches, cpu, ten_crop), run(reader, batches, device, ten_crop))
        agrees[f"{name}, from JPEGs"] = (
            f"{found.images} images, mean absolute difference {found.mean:.3f} levels (worst image "
            f"{found.worst_mean:.3f}), worst bias {found.worst_bias:.3f}, largest difference {found.largest:.0f}, "
            f"at most {found.worst_beyond:.3%} of an image beyond {MAX_LEVELS:g}"
        )
        problems += [f"{name}, from JPEGs: {problem}" for problem in found.problems]
    loader = Loader(train, info.rgb, plan.batch_size, device, threads, gpu_decoder=gpu_decoder)
    host, on_device = memory_growth(loader, plan, memory_batches, device)
    return GpuCheck(agrees, tuple(problems), host, on_device, memory_batches)


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
