"""One picture of a training batch as the network sees it: each image as stored, its window, and what colour does to it.

A row an image, from left to right: the stored 256 x 256 pixels with the window that this epoch cuts; the window,
mirrored or not, before its colour shift; the same as the network gets it, but for the mean, which is added again; and
the colour shift many times over, which the network never sees, since the paper's is too small for most eyes.
"""

from __future__ import annotations

import dataclasses
import io
import os
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from jobs.cli import run
from pipeline.dataset import DatasetInfo, read_dataset, write_atomically
from pipeline.decode import IMAGE_SIZE
from pipeline.loader import Loader
from pipeline.plan import CROP_SIZE, Augmentation, Plan, colour_matrix
from pipeline.rgb_stats import MAX_LEVEL
from pipeline.split_reader import SplitReader

ROW_INCHES = 2.55
WIDTH_INCHES = 11.5
DPI = 100
MARK = "#ff2d95"  # A colour that photographs rarely have.


@dataclasses.dataclass(frozen=True)
class LookConfig:
    data: Path
    """A shard set."""
    output: Path = Path("look.png")
    """The picture to write."""
    images: int = 6
    """Rows: the first so many images of the batch."""
    epoch: int = 0
    """Which epoch's draws."""
    step: int = 0
    """Which batch of that epoch."""
    batch_size: int = 128
    """The global batch; smaller where the set is smaller."""
    seed: int = 0
    """The training run's seed."""
    colour: Literal["eigenvalue", "std", "none"] = "eigenvalue"
    """How the colour shift scales, as in the recipe."""
    exaggerate: float = 8.0
    """In the last column the colour shift is so many times as large."""

    def __post_init__(self) -> None:
        if self.images < 1 or self.batch_size < 1 or self.epoch < 0 or self.step < 0:
            raise ValueError(f"images and batch size must be at least 1, epoch and step at least 0: {self}")


@dataclasses.dataclass(frozen=True)
class Seen:
    """Some images of one batch, at each stage; all pixels uint8 in RGB."""

    stored: NDArray[np.uint8]
    """[n, 256, 256, 3]"""
    window: NDArray[np.uint8]
    """[n, 227, 227, 3]: cut and mirrored, without the colour shift."""
    network: NDArray[np.uint8]
    """[n, 227, 227, 3]: as the network gets it, the mean added again."""
    exaggerated: NDArray[np.uint8]
    """[n, 227, 227, 3]: with a larger colour shift."""
    drawn: Augmentation
    samples: NDArray[np.int64]
    """[n]: their rows in the sample index."""
    names: list[str]
    """Each image's class."""


def look(config: LookConfig, info: DatasetInfo, reader: SplitReader) -> Seen:
    """Runs the loader on one batch and undoes, in the pixels that came out of it, the mean and the colour shift.

    Raises:
        ValueError: if the epoch has no such step.
    """
    plan = Plan(len(reader), min(config.batch_size, len(reader)), config.seed, colour_matrix(info.rgb, config.colour))
    if config.step >= plan.steps:
        raise ValueError(f"step {config.step} was asked for, but an epoch has {plan.steps}: use a lower --step")
    planned = next(next(plan.epoch(config.epoch, config.step)).chunks(config.images))
    drawn = planned.draw(planned.samples)
    loader = Loader(reader, info.rgb, len(planned), torch.device("cpu"), os.cpu_count() or 1)
    (batch,) = loader.run([planned])
    mean = np.array(info.rgb.mean) * MAX_LEVEL
    network = batch.images.permute(0, 2, 3, 1).numpy().astype(np.float64) + mean
    shift = drawn.shifts[:, None, None, :].astype(np.float64)
    return Seen(
        stored=np.stack([reader.decoded(sample) for sample in planned.samples.tolist()]),
        window=levels(network - shift),
        network=levels(network),
        exaggerated=levels(network + (config.exaggerate - 1) * shift),
        drawn=drawn,
        samples=planned.samples,
        names=[info.classes[label].name for label in reader.labels[planned.samples]],
    )


def levels(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Rounded and clipped to what a screen shows."""
    return np.clip(np.rint(values), 0, MAX_LEVEL).astype(np.uint8)


def picture(seen: Seen, config: LookConfig, summary: str) -> Figure:
    """The rows, under a heading for each column."""
    rows = len(seen.samples)
    figure = Figure(figsize=(WIDTH_INCHES, ROW_INCHES * rows + 1.5), layout="constrained")
    figure.suptitle(summary, fontsize=12)
    headings = (
        "stored, 256 x 256,\nand the window cut from it",
        "the window, 227 x 227,\nmirrored or not",
        "what the network sees\n(its colour shift added)",
        f"colour shift x {config.exaggerate:g}: for the eye only,\nthe network never sees this",
    )
    grid = figure.subplots(rows, 4, squeeze=False)
    for row, axes in enumerate(grid):
        top, left = (int(offset) for offset in seen.drawn.crops[row])
        mirrored = bool(seen.drawn.flips[row])
        red, green, blue = seen.drawn.shifts[row]
        show(axes[0], around(seen.stored[row], top, left), f"{seen.names[row]}, image {seen.samples[row]}")
        axes[0].add_patch(Rectangle((left - 0.5, top - 0.5), CROP_SIZE, CROP_SIZE, fill=False, color=MARK, linewidth=2))
        show(axes[1], seen.window[row], f"top {top}, left {left}" + (", mirrored" if mirrored else ""))
        if mirrored:
            axes[1].xaxis.label.set(color=MARK, fontweight="bold")
        show(axes[2], seen.network[row], f"red {red:+.1f}, green {green:+.1f}, blue {blue:+.1f} levels")
        factor = config.exaggerate
        show(axes[3], seen.exaggerated[row], f"{factor * red:+.0f}, {factor * green:+.0f}, {factor * blue:+.0f}")
    for axes, heading in zip(grid[0], headings, strict=True):
        axes.set_title(heading, fontsize=11, fontweight="bold")
    return figure


def around(image: NDArray[np.uint8], top: int, left: int) -> NDArray[np.uint8]:
    """A stored image with what lies outside its window faded."""
    faded = 255 - (255 - image) // 3
    inside = slice(top, top + CROP_SIZE), slice(left, left + CROP_SIZE)
    faded[inside] = image[inside]
    return faded


def show(axes: Axes, image: NDArray[np.uint8], caption: str) -> None:
    """An image with a caption; pixels are equally large in all, so that a window looks smaller than its source."""
    axes.imshow(image, interpolation="nearest")
    room = (IMAGE_SIZE - len(image)) / 2 + 0.5
    axes.set_xlim(-room, len(image) - 1 + room)
    axes.set_ylim(len(image) - 1 + room, -room)
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(caption, fontsize=10)


def main(config: LookConfig) -> None:
    info = read_dataset(config.data)
    reader = SplitReader(config.data, info, "train")
    seen = look(config, info, reader)
    shares = ", ".join(f"{value / sum(info.rgb.eigenvalues):.1%}" for value in info.rgb.eigenvalues)
    summary = (
        f"Epoch {config.epoch + 1}, step {config.step + 1} of {config.data.name}, seed {config.seed}: "
        f"the first {len(seen.samples)} images of the batch.\n"
        f"Colour: three draws of N(0, 0.1) along the components of the set's RGB, {shares} of its variance"
    )
    buffer = io.BytesIO()
    with mpl.rc_context({"font.family": "sans-serif"}):
        picture(seen, config, summary).savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    write_atomically(config.output, buffer.getvalue())
    print(f"{len(seen.samples)} images of one batch: {config.output}")


if __name__ == "__main__":
    run(LookConfig, main)
