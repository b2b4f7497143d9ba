"""Two pictures of a finished set, to see at a glance what is in it: a contact sheet, and its RGB components.

They show stored training images of a few shards, so a set of any size takes the same second. Equal sets give equal
bytes, as long as Pillow and matplotlib are the same.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.dataset import DatasetInfo, Split, SplitReader, write_atomically
from pipeline.rgb_stats import MAX_LEVEL, RgbStatistics

SHEET_FILE = "contact_sheet.jpg"
PCA_FILE = "rgb_pca.png"

SHARDS_READ = 16  # Of 1250 mixed images of 1000 classes each: about 20 images of a class.
ROWS, COLUMNS = 10, 8
TILE, GAP = 128, 6  # Pixels.
LABEL_WIDTH, HEAD, MARGIN = 230, 84, 24
INK, FAINT, PAPER = "#1b1b1b", "#6b6b6b", "#ffffff"

# The values of ImageNet that most programs carry, from fb.resnet.torch (datasets/imagenet.lua), RGB in [0, 1]; columns
# belong to eigenvalues, as here.
IMAGENET_EIGENVALUES = (0.2175, 0.0188, 0.0045)
IMAGENET_EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))

ALPHA_STD = 0.1  # Of the paper's colour shift, section 4.1.


@dataclasses.dataclass(frozen=True)
class Row:
    """A few images of one class."""

    label: int
    images: tuple[NDArray[np.uint8], ...]
    """Each [height, width, 3]."""


def write_pictures(root: Path, info: DatasetInfo) -> None:
    """Writes ROOT/contact_sheet.jpg and ROOT/rgb_pca.png for a set whose shards are all there.

    Raises:
        DatasetError, OSError: if a shard that is shown cannot be read, or a picture cannot be written.
    """
    rows = choose(root, info)
    write_atomically(root / SHEET_FILE, contact_sheet(info, rows))
    write_atomically(root / PCA_FILE, pca_figure(info.rgb, [image for row in rows for image in row.images]))


def choose(root: Path, info: DatasetInfo) -> list[Row]:
    """Up to ROWS classes, evenly spread over those that have enough images in a few shards, and COLUMNS images of each."""
    shards = info.splits["train"].shards
    some = tuple(shards[i] for i in _spread(len(shards), SHARDS_READ))
    part = Split(sum(row.samples for row in some), sum(row.bytes for row in some), some)
    reader = SplitReader(root, dataclasses.replace(info, splits={"train": part}), "train")
    counts = np.bincount(reader.labels, minlength=len(info.classes))
    # The fullest classes, but any with a full row is as good as another.
    order = np.argsort(-np.minimum(counts, COLUMNS), kind="stable")
    full = np.flatnonzero(counts >= COLUMNS)
    candidates = full if len(full) >= ROWS else np.sort(order[: min(ROWS, np.count_nonzero(counts))])
    rows = []
    for label in candidates[_spread(len(candidates), ROWS)].tolist():
        samples = np.flatnonzero(reader.labels == label)[:COLUMNS].tolist()
        rows.append(Row(label, tuple(_decoded(reader.image(sample).tobytes()) for sample in samples)))
    return rows


def _spread(count: int, most: int) -> NDArray[np.int64]:
    """Up to `most` of the numbers 0 to count - 1, evenly apart."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(np.int64)


def _decoded(jpeg: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(jpeg)) as image:
        return np.asarray(image.convert("RGB"))


def contact_sheet(info: DatasetInfo, rows: Sequence[Row]) -> bytes:
    """A JPEG with a class a row: its name, what it is numbered, and some of its images."""
    columns = max(len(row.images) for row in rows)
    width = 2 * MARGIN + LABEL_WIDTH + columns * (TILE + GAP) - GAP
    height = HEAD + len(rows) * (TILE + GAP) - GAP + MARGIN
    sheet = Image.new("RGB", (max(width, 640), height), PAPER)
    draw = ImageDraw.Draw(sheet)
    large, middle, small = (ImageFont.load_default(size) for size in (26, 18, 14))
    counts = ", ".join(f"{part.samples:,} {split}" for split, part in info.splits.items())
    draw.text((MARGIN, 16), f"{len(info.classes):,} classes, {counts} images", INK, large)
    draw.text((MARGIN, 52), "Some training images, as they are stored", FAINT, small)
    for number, row in enumerate(rows):
        top = HEAD + number * (TILE + GAP)
        label = info.classes[row.label]
        lines = _wrapped(label.name.replace("_", " "), middle, LABEL_WIDTH - 16)
        for i, line in enumerate(lines):
            draw.text((MARGIN, top + 4 + 22 * i), line, INK, middle)
        detail = f"{row.label}" if label.wnid == label.name else f"{row.label}   {label.wnid}"
        draw.text((MARGIN, top + 8 + 22 * len(lines)), detail, FAINT, small)
        for i, image in enumerate(row.images):
            tile = Image.fromarray(image).resize((TILE, TILE), Image.Resampling.LANCZOS)
            sheet.paste(tile, (MARGIN + LABEL_WIDTH + i * (TILE + GAP), top))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=88, subsampling="4:4:4")
    return buffer.getvalue()


def _wrapped(text: str, font: Any, width: int, most: int = 3) -> list[str]:
    """A text in up to `most` lines of `width` pixels; what is too long ends in dots."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], f"{lines[most - 1]} ..."]
    cut = []
    for line in lines:
        short = line
        while font.getlength(short) > width:
            short = f"{short.removesuffix('...')[:-1]}..."
        cut.append(short)
    return cut


def pca_figure(rgb: RgbStatistics, images: Sequence[NDArray[np.uint8]]) -> bytes:
    """A PNG: pixels and eigenvectors in the cube of colours, both beside ImageNet's values, and what each does.

    Args:
        images: each [height, width, 3]; pixels of all are shown, and the most varied one is shifted.
    """
    # Half a second to import, which the workers that build shards never need.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8.6), dpi=100, layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1.75, 1])
    left, right = upper.subfigures(1, 2, width_ratios=[1, 1.15])
    _draw_cube(left, rgb, np.concatenate([image[8::32, 8::32].reshape(-1, 3) for image in images]))
    _draw_values(right, rgb)
    _draw_shifts(lower, rgb, max(images, key=lambda image: float(image.std(axis=(0, 1)).sum())))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


COMPONENT_COLOURS = ("#1b1b1b", "#c2571a", "#2b6cb0")


def _draw_cube(figure: Any, rgb: RgbStatistics, pixels: NDArray[np.uint8]) -> None:
    axes = figure.add_subplot(projection="3d", computed_zorder=False)
    points = pixels / MAX_LEVEL
    axes.scatter(*points.T, c=points, s=7, linewidths=0, alpha=0.75, depthshade=False)
    mean, vectors = np.array(rgb.mean), np.array(rgb.eigenvectors)
    for i, colour in enumerate(COMPONENT_COLOURS):
        reach = vectors[:, i] * np.sqrt(rgb.eigenvalues[i])
        ends = np.stack([mean - reach, mean + reach])
        axes.plot(*ends.T, color="white", linewidth=6, zorder=5)
        axes.plot(*ends.T, color=colour, linewidth=3, zorder=6)
        axes.text(*(mean + 1.18 * reach), f"{i + 1}", color=colour, fontsize=13, fontweight="bold", zorder=7)
    for name, axis in zip(("red", "green", "blue"), (axes.xaxis, axes.yaxis, axes.zaxis), strict=True):
        axis.set_label_text(name)
        axis.set_ticks([0, 0.5, 1])
        axis.set_pane_color((1, 1, 1, 0))
    axes.set(xlim=(0, 1), ylim=(0, 1), zlim=(0, 1))
    axes.view_init(elev=18, azim=-62)
    axes.set_title(
        f"Pixels of {pixels.shape[0]:,} places, and one standard deviation\nalong each component from the mean"
    )


def _draw_values(figure: Any, rgb: RgbStatistics) -> None:
    values, vectors = figure.subplots(2, 1)
    places = np.arange(3)
    for offset, numbers, name, colour in (
        (-0.2, rgb.eigenvalues, "this set", "#2b6cb0"),
        (0.2, IMAGENET_EIGENVALUES, "ImageNet, as widely used", "#b8c4d0"),
    ):
        bars = values.bar(places + offset, numbers, 0.38, label=name, color=colour)
        values.bar_label(bars, [f"{number:.4f}" for number in numbers], padding=2)
    values.set_yscale("log")
    values.set_ylim(top=1.2)
    values.set_xticks(places, ["component 1", "component 2", "component 3"])
    values.set_title("Eigenvalues, RGB in [0, 1]")
    values.legend(frameon=False)
    own = np.array(rgb.eigenvectors)
    known = np.array(IMAGENET_EIGENVECTORS)
    # A vector's sign has no meaning.
    known = known * np.where((own * known).sum(axis=0) < 0, -1, 1)
    for channel, colour in enumerate(("#c53030", "#2f855a", "#2b6cb0")):
        for offset, matrix, alpha in ((-0.05, own, 1.0), (0.05, known, 0.4)):
            at = places + (channel - 1) * 0.27 + offset * 1.1
            bars = vectors.bar(at, matrix[channel], 0.11, color=colour, alpha=alpha)
        vectors.annotate(
            "RGB"[channel], (places[0] + (channel - 1) * 0.27, 0), (0, -12), textcoords="offset points", ha="center"
        )
    vectors.axhline(0, color=INK, linewidth=0.8)
    vectors.set_xticks(places, ["component 1", "component 2", "component 3"])
    vectors.set_ylim(-1, 1)
    vectors.set_title("Eigenvectors: this set full, ImageNet pale")
    for axes in (values, vectors):
        axes.spines[["top", "right"]].set_visible(False)


def _draw_shifts(figure: Any, rgb: RgbStatistics, image: NDArray[np.uint8]) -> None:
    grid = figure.subplots(1, 7)
    figure.suptitle("One standard deviation of each component, taken away and added")
    grid[0].imshow(image)
    grid[0].set_title("as stored", fontsize=10)
    for i in range(3):
        direction = np.array(rgb.eigenvectors)[:, i]
        shift = MAX_LEVEL * np.sqrt(rgb.eigenvalues[i]) * direction
        for axes, sign in ((grid[2 * i + 1], -1), (grid[2 * i + 2], 1)):
            axes.imshow(np.clip(image + sign * shift, 0, MAX_LEVEL).round().astype(np.uint8))
            axes.set_title(f"{'-' if sign < 0 else '+'} component {i + 1}", fontsize=10)
    for axes in grid:
        axes.axis("off")
