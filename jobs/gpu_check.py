"""The GPU loader's stream against the CPU's: the same plan decoded by both, compared pixel by pixel, and timed.

Two correct JPEG decoders differ. Their inverse DCTs may differ by 1, interpolating chroma rounds once more, and the
conversion to RGB weighs chroma by up to 1.772: blue may differ by 1 + 1.772 * 2 + 0.5, that is 5 levels. So values may
differ by 5, one in a thousand by more, and an image by 1 level on average. What this finds: another window, mirroring,
colour shift, mean or channel order, and chroma that is repeated instead of interpolated.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.dataset import read_dataset
from pipeline.loader import Batch, Loader
from pipeline.plan import Plan, Views, centre_views, colour_matrix, ten_crop_views
from pipeline.split_reader import SplitReader

MAX_LEVELS = 5.0  # A value further off than two correct decoders can be...
MAX_BEYOND = 0.001  # ...which this share of an image's values may be.
MAX_MEAN = 1.0  # Mean absolute difference of an image. libjpeg's fast inverse DCT, a poor one, differs by 0.98.
MAX_BIAS = 0.5  # Mean difference of a channel over an image: rounding has no side.
TEN_CROPS = 10


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
                sample = int(one.samples[image])
                value = float(found[image, column])
                problems.setdefault(name, f"batch {number}, sample {sample}: {value:.4g} {what} (at most {limit:g})")
    every = torch.cat(rows) if rows else torch.zeros(0, 4)
    if not len(every):
        problems.setdefault("length", "no image was compared")
        every = torch.zeros(1, 4)
    mean, bias, beyond, largest = every.amax(0).tolist()
    count = sum(len(row) for row in rows)
    return Comparison(count, float(every[:, 0].mean()), mean, bias, beyond, largest, tuple(problems.values()))


def streams(train: SplitReader, val: SplitReader, plan: Plan, steps: int) -> dict[str, tuple[SplitReader, list[Views]]]:
    """What is compared: training with all its draws, validation's centre, and the ten crops, some steps of each."""
    first = np.array_split(np.arange(len(val)), max(1, len(val) // plan.batch_size))[:steps]
    ten = np.array_split(np.arange(len(val)), max(1, TEN_CROPS * len(val) // plan.batch_size))[:steps]
    return {
        "training": (train, list(itertools.islice(plan.epoch(0), steps))),
        "centre crop": (val, [view for samples in first for view in centre_views(samples).chunks(plan.batch_size)]),
        "ten crops": (val, [view for samples in ten for view in ten_crop_views(samples).chunks(plan.batch_size)]),
    }


def check(data: Path, device: torch.device, batch_size: int, steps: int, threads: int) -> list[str]:
    """Compares and times a loader on `device` with one on the CPU; returns the report's lines.

    Raises:
        GpuCheckError: if a stream is out of tolerance.
    """
    info = read_dataset(data)
    train, val = SplitReader(data, info, "train"), SplitReader(data, info, "val")
    plan = Plan(len(train), batch_size, 0, colour_matrix(info.rgb))
    lines, problems = [], []
    loaders: dict[SplitReader, tuple[Loader, Loader]] = {
        reader: (
            Loader(reader, info.rgb, batch_size, torch.device("cpu"), threads),
            Loader(reader, info.rgb, batch_size, device, threads),
        )
        for reader in (train, val)
    }
    for name, (reader, views) in streams(train, val, plan, steps).items():
        host, other = loaders[reader]
        found = compare(host.run(views), other.run(views))
        verdict = "differs" if found.problems else "agrees"
        lines.append(
            f"{name}: {found.images} images, mean absolute difference {found.mean:.3f} levels (worst image "
            f"{found.worst_mean:.3f}), worst bias {found.worst_bias:.3f}, largest difference {found.largest:.0f}, "
            f"at most {found.worst_beyond:.3%} of an image beyond {MAX_LEVELS:g}: {verdict}"
        )
        problems += [f"{name}, {problem}" for problem in found.problems]
    host, other = loaders[train]
    for name, loader in (("cpu", host), (str(device), other)):
        lines.append(
            f"loader on {name}: {images_per_s(loader, plan, steps, device):,.0f} images/s, {threads} thread(s)"
        )
    if problems:
        print("\n".join(lines))
        raise GpuCheckError(f"the stream on {device} is not the CPU's: {'; '.join(problems)}")
    return lines


def images_per_s(loader: Loader, plan: Plan, steps: int, device: torch.device) -> float:
    """A loader's rate over some steps, after a first one that fills its queues."""

    def views() -> Iterator[Views]:
        for epoch in itertools.count():
            yield from plan.epoch(epoch)

    settle: Callable[[], None] = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    batches = loader.run(itertools.islice(views(), steps + 1))
    next(batches)
    settle()
    started = time.perf_counter()
    images = sum(len(batch) for batch in batches)
    settle()
    return images / (time.perf_counter() - started)
