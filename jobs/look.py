"""One picture of a training batch as the network sees it.

A row an image, from left to right: the stored 256 x 256 pixels with the crop marked; the crop as the network gets it,
flipped or not and with its color shift, but with the mean added again; and the same with eight times the color shift,
since the paper's is hardly visible.

    python jobs/look.py --data SHARDS --output look.png
"""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

from jobs.cli.command import run
from jobs.cli.cores import cores

ROW_INCHES = 3.2
WIDTH_INCHES = 10.5
DPI = 100
EXAGGERATION = 8  # Of the color shift, in the last column.
MARK = "#ff2d95"  # A color that photographs rarely have.


@dataclasses.dataclass(frozen=True)
class LookConfig:
    data: Path
    """A shard set."""
    output: Path = Path("look.png")
    """The picture to write."""
    images: int = 6
    """Rows: the first images of the first batch."""
    seed: int = 0
    """The training run's."""

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError(f"--images is {self.images}; it must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed is {self.seed}; it must lie in [0, 2^63)")


if __name__ == "__main__":
    run(LookConfig, "jobs.look")  # Before the imports below, which take seconds.

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from jobs.cli.locations import check_parent
from pipeline.dataset.info import DatasetInfo, read_dataset
from pipeline.dataset.split_reader import SplitReader
from pipeline.images.decode import IMAGE_SIZE
from pipeline.images.rgb_stats import MAX_LEVEL
from pipeline.loading.loader import Loader
from pipeline.loading.plan import CROP_SIZE, Augmentation, Plan, color_matrix
from pipeline.storage.remote import write_atomically


@dataclasses.dataclass(frozen=True)
class Seen:
    """Some images of one batch, at each stage; all pixels uint8 in RGB."""

    stored: NDArray[np.uint8]
    """[n, 256, 256, 3]"""
    network: NDArray[np.uint8]
    """[n, 227, 227, 3]: as the network gets it, with the mean added again."""
    exaggerated: NDArray[np.uint8]
    """[n, 227, 227, 3]: with a larger color shift."""
    drawn: Augmentation
    samples: NDArray[np.int64]
    """[n]: their rows in the sample index."""
    names: list[str]
    """Each image's class."""


def look(config: LookConfig, info: DatasetInfo, reader: SplitReader) -> Seen:
    """Runs the loader on one batch; adds the mean, and more of the color shift, to the pixels that come out of it."""
    plan = Plan(len(reader), min(config.images, len(reader)), config.seed, color_matrix(info.rgb))
    planned = next(plan.epoch(0))
    drawn = planned.draw(planned.samples)
    loader = Loader(reader, info.rgb, len(planned), torch.device("cpu"), cores())
    (batch,) = loader.run([planned])
    mean = np.array(info.rgb.mean) * MAX_LEVEL
    network = batch.images.permute(0, 2, 3, 1).numpy().astype(np.float64) + mean
    shift = drawn.shifts[:, None, None, :].astype(np.float64)
    return Seen(
        stored=np.stack([reader.decoded(sample) for sample in planned.samples.tolist()]),
        network=levels(network),
        exaggerated=levels(network + (EXAGGERATION - 1) * shift),
        drawn=drawn,
        samples=planned.samples,
        names=[info.classes[label].name for label in reader.labels[planned.samples]],
    )


def levels(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Rounded and clipped to what a screen shows."""
    return np.clip(np.rint(values), 0, MAX_LEVEL).astype(np.uint8)


def picture(seen: Seen, summary: str) -> Figure:
    """The rows, under a heading for each column."""
    rows = len(seen.samples)
    figure = Figure(figsize=(WIDTH_INCHES, ROW_INCHES * rows + 1.5), layout="constrained")
    figure.suptitle(summary, fontsize=12, parse_math=False)
    headings = (
        "stored, 256 x 256,\nand the crop",
        "what the network sees,\n227 x 227",
        f"color shift x {EXAGGERATION}: for the eye only,\nthe network never sees this",
    )
    grid = figure.subplots(rows, len(headings), squeeze=False)
    for row, axes in enumerate(grid):
        top, left = (int(offset) for offset in seen.drawn.crops[row])
        shift = seen.drawn.shifts[row]
        crop = f"top {top}, left {left}" + (", flipped" if seen.drawn.flips[row] else "")
        show(axes[0], seen.stored[row], f"{seen.names[row]}, image {seen.samples[row]}\n{crop}")
        axes[0].add_patch(Rectangle((left - 0.5, top - 0.5), CROP_SIZE, CROP_SIZE, fill=False, color=MARK, linewidth=2))
        show(axes[1], seen.network[row], "red {:+.1f}, green {:+.1f}, blue {:+.1f} levels".format(*shift))
        show(axes[2], seen.exaggerated[row], "{:+.0f}, {:+.0f}, {:+.0f}".format(*EXAGGERATION * shift))
    for axes, heading in zip(grid[0], headings, strict=True):
        axes.set_title(heading, fontsize=11, fontweight="bold")
    return figure


def show(axes: Axes, image: NDArray[np.uint8], caption: str) -> None:
    """An image with a caption, all at one scale, so that a crop looks smaller than its source."""
    axes.imshow(image, interpolation="nearest")
    room = (IMAGE_SIZE - len(image)) / 2 + 0.5
    axes.set(xlim=(-room, len(image) - 1 + room), ylim=(len(image) - 1 + room, -room), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_xlabel(caption, fontsize=10, parse_math=False)


def main(config: LookConfig) -> None:
    check_parent("--output", config.output)
    info = read_dataset(config.data)
    reader = SplitReader(config.data, info, "train")
    seen = look(config, info, reader)
    shares = ", ".join(f"{value / (sum(info.rgb.eigenvalues) or 1):.1%}" for value in info.rgb.eigenvalues)
    summary = (
        f"The first {len(seen.samples)} images of the first batch of {config.data.name}, seed {config.seed}.\n"
        f"Color: three draws of N(0, 0.1) along the components of the set's RGB, {shares} of its variance"
    )
    buffer = io.BytesIO()
    with mpl.rc_context({"font.family": "sans-serif"}):
        picture(seen, summary).savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    write_atomically(config.output, buffer.getvalue())
    print(f"{len(seen.samples)} images of one batch: {config.output}")
