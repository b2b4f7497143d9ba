"""Two pictures of a finished set, to see at a glance what is in it: a contact sheet, and its RGB components.

They show stored training images of a few shards, so a set of any size takes the same second. Equal sets give equal
bytes, as long as Pillow and matplotlib are the same.
"""

from __future__ import annotations

import dataclasses
import io
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.dataset.info import DatasetInfo
from pipeline.dataset.sample_index import open_index
from pipeline.images.decode import decode_stored
from pipeline.images.rgb_stats import MAX_LEVEL, RgbStatistics
from pipeline.sources.files import read_bytes
from pipeline.storage.locations import Location, join
from pipeline.storage.remote import write

SHEET_FILE = "contact_sheet.jpg"
PCA_FILE = "rgb_pca.png"

SHARDS_READ = 16  # Of 1250 mixed images of 1000 classes each: about 20 images of a class.
ROWS, COLUMNS = 10, 8
TILE, GAP = 128, 6  # Pixels.
LABEL_WIDTH, HEAD, MARGIN = 230, 84, 24
LABEL_LETTERS = 20  # A line of a class's name; what is wider still lies under the images.
INK, FAINT, PAPER = "#1b1b1b", "#6b6b6b", "#ffffff"

# The values of ImageNet that most programs carry, from fb.resnet.torch (datasets/imagenet.lua), RGB in [0, 1]; columns
# belong to eigenvalues, as here.
IMAGENET_EIGENVALUES = (0.2175, 0.0188, 0.0045)
IMAGENET_EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))

LEAST_EIGENVALUE = 1e-3  # Of the plot; that of one gray level is a hundredth of it.
ALPHA_STD = 0.1  # Of the paper's color shift, section 4.1.
COMPONENT_COLORS = ("#1b1b1b", "#c2571a", "#6b3fa0")


@dataclasses.dataclass(frozen=True)
class Row:
    """A few images of one class."""

    label: int
    images: tuple[NDArray[np.uint8], ...]
    """Each [height, width, 3]."""


def write_pictures(root: Location, info: DatasetInfo) -> None:
    """Writes ROOT/contact_sheet.jpg and ROOT/rgb_pca.png for a set whose shards are all there.

    Raises:
        DatasetError, ImageError, OSError: if a shard that is shown cannot be read, or a picture cannot be written.
    """
    rows = choose(root, info)
    write(join(root, SHEET_FILE), contact_sheet(info, rows))
    write(join(root, PCA_FILE), pca_figure(info.rgb, [image for row in rows for image in row.images]))


def choose(root: Location, info: DatasetInfo) -> list[Row]:
    """Up to ROWS classes, evenly spread over those that have enough images in a few shards, with COLUMNS images."""
    shards = info.splits["train"].shards
    index = open_index(root, "train", info.splits["train"], len(info.classes))
    parts = [index.of_shard(i) for i in _spread(len(shards), SHARDS_READ).tolist()]
    some = np.concatenate([np.arange(part.start, part.stop) for part in parts])
    labels = index.labels[some]
    counts = np.bincount(labels, minlength=len(info.classes))
    # The fullest classes, but any with a full row is as good as another.
    order = np.argsort(-np.minimum(counts, COLUMNS), kind="stable")
    full = np.flatnonzero(counts >= COLUMNS)
    candidates = full if len(full) >= ROWS else np.sort(order[: min(ROWS, np.count_nonzero(counts))])
    rows = []
    for label in candidates[_spread(len(candidates), ROWS)].tolist():
        images = []
        for sample in some[labels == label][:COLUMNS].tolist():
            tar = join(root, "train", f"{shards[index.shards[sample]].name}.tar")
            images.append(decode_stored(read_bytes(tar, int(index.offsets[sample]), int(index.sizes[sample]))))
        rows.append(Row(label, tuple(images)))
    return rows


def _spread(count: int, most: int) -> NDArray[np.int64]:
    """Up to `most` of the numbers 0 to count - 1, evenly apart."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(np.int64)


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
        lines = textwrap.wrap(label.name.replace("_", " "), LABEL_LETTERS, max_lines=3, placeholder=" ...")
        for i, line in enumerate(lines):
            draw.text((MARGIN, top + 4 + 22 * i), line, INK, middle)
        detail = f"label {row.label}" if label.wnid == label.name else f"label {row.label}, {label.wnid}"
        draw.text((MARGIN, top + 8 + 22 * len(lines)), detail, FAINT, small)
        for i, image in enumerate(row.images):
            tile = Image.fromarray(image).resize((TILE, TILE), Image.Resampling.LANCZOS)
            sheet.paste(tile, (MARGIN + LABEL_WIDTH + i * (TILE + GAP), top))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=88, subsampling="4:4:4")
    return buffer.getvalue()


def pca_figure(rgb: RgbStatistics, images: Sequence[NDArray[np.uint8]]) -> bytes:
    """A PNG: pixels and eigenvectors in the cube of colors, both beside ImageNet's values, and what each does.

    Args:
        images: each [height, width, 3]; pixels of all are shown, and one with typical colors is shifted.
    """
    # Half a second to import, which the workers that build shards never need.
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # A user's own settings must not decide on the set's bytes.
    with mpl.rc_context():
        mpl.rcdefaults()
        # Axes by hand: letting matplotlib arrange them takes longer than all the rest.
        figure = Figure(figsize=(13, 8.2), dpi=100)
        pixels = np.concatenate([image[8::32, 8::32].reshape(-1, 3) for image in images])
        _draw_cube(figure.add_axes((0.0, 0.335, 0.49, 0.615), projection="3d", computed_zorder=False), rgb, pixels)
        _draw_values(figure.add_axes((0.53, 0.69, 0.45, 0.26)), rgb)
        _draw_vectors(figure.add_axes((0.53, 0.37, 0.45, 0.24)), rgb)
        shift = ", ".join(f"{ALPHA_STD * value * MAX_LEVEL:.1f}" for value in rgb.eigenvalues)
        explained = (
            "One standard deviation (SD) along each component, taken away and added. "
            f"Training shifts by 0.1 eigenvalues (SD): {shift} gray levels."
        )
        figure.text(0.5, 0.277, explained, ha="center", va="center", fontsize=11)
        _draw_shifts(figure.add_axes((0.012, 0.0, 0.976, 0.23)), rgb, images)
        buffer = io.BytesIO()
        # Without the name of matplotlib's version.
        figure.savefig(buffer, format="png", metadata={"Software": None}, pil_kwargs={"compress_level": 4})
        return buffer.getvalue()


def _draw_cube(axes: Any, rgb: RgbStatistics, pixels: NDArray[np.uint8]) -> None:
    """Pixels at their colors, and the components through their mean.

    Args:
        pixels: [pixels, 3].
    """
    points = pixels / MAX_LEVEL
    axes.scatter(*points.T, c=points, s=9, linewidths=0, depthshade=False)
    mean, vectors = np.array(rgb.mean), np.array(rgb.eigenvectors)
    for i, color in enumerate(COMPONENT_COLORS):
        reach = vectors[:, i] * np.sqrt(rgb.eigenvalues[i])
        ends = np.stack([mean - reach, mean + reach])
        axes.plot(*ends.T, color="white", linewidth=7, zorder=5)
        axes.plot(*ends.T, color=color, linewidth=4, zorder=6)
        place = mean + reach + 0.06 * vectors[:, i]
        box = {"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": color}
        axes.text(*place, str(i + 1), color=color, ha="center", va="center", fontweight="bold", bbox=box, zorder=7)
    for name, axis in zip(("red", "green", "blue"), (axes.xaxis, axes.yaxis, axes.zaxis), strict=True):
        axis.set_label_text(name)
        axis.set_ticks([0, 0.5, 1], ["0", "0.5", "1"])
        axis.set_pane_color((1, 1, 1, 0))
    axes.set(xlim=(0, 1), ylim=(0, 1), zlim=(0, 1))
    axes.set_box_aspect((1, 1, 1), zoom=1.1)
    # From here no component points at the eye.
    axes.view_init(elev=14, azim=-16)
    axes.set_title("Pixels of the contact sheet; one SD along each component")


def _draw_values(axes: Any, rgb: RgbStatistics) -> None:
    places = np.arange(3)
    for offset, numbers, name, color in (
        (-0.2, rgb.eigenvalues, "this set", "#2b6cb0"),
        (0.2, IMAGENET_EIGENVALUES, "ImageNet, as widely used", "#b8c4d0"),
    ):
        bars = axes.bar(places + offset, np.maximum(numbers, LEAST_EIGENVALUE), 0.38, label=name, color=color)
        axes.bar_label(bars, [f"{number:.4f}" for number in numbers], padding=2)
    axes.set_yscale("log")
    axes.set_ylim(LEAST_EIGENVALUE, 1)
    # Powers of ten would be set as formulas, which takes a fifth of the whole drawing.
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_title("Eigenvalues, RGB in [0, 1]")
    axes.legend(frameon=False)
    _mark_components(axes)


def _draw_vectors(axes: Any, rgb: RgbStatistics) -> None:
    own, known = np.array(rgb.eigenvectors), np.array(IMAGENET_EIGENVECTORS)
    # A vector's sign has no meaning.
    known = known * np.where((own * known).sum(axis=0) < 0, -1, 1)
    for channel, color in enumerate(("#c53030", "#2f855a", "#2b6cb0")):
        for component in range(3):
            middle = component + (channel - 1) * 0.27
            axes.bar(middle - 0.055, own[channel, component], 0.11, color=color)
            axes.bar(middle + 0.055, known[channel, component], 0.11, color=color, alpha=0.4)
            # On the free side of the zero line.
            place = (0, -11) if own[channel, component] > 0 else (0, 4)
            axes.annotate("RGB"[channel], (middle, 0), place, textcoords="offset points", ha="center", fontsize=9)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_ylim(-1, 1)
    axes.set_title("Eigenvectors; ImageNet's are pale")
    _mark_components(axes)


def _mark_components(axes: Any) -> None:
    axes.set_xticks(range(3), [f"component {i + 1}" for i in range(3)])
    axes.spines[["top", "right"]].set_visible(False)
    for text, color in zip(axes.get_xticklabels(), COMPONENT_COLORS, strict=True):
        text.set(color=color, fontweight="bold")


def _draw_shifts(axes: Any, rgb: RgbStatistics, images: Sequence[NDArray[np.uint8]]) -> None:
    """A strip of one image, shifted along each component."""
    mean = MAX_LEVEL * np.array(rgb.mean)
    # One with typical colors.
    image = min(images, key=lambda image: float(np.abs(image.mean((0, 1)) - mean).sum())).astype(np.float64)
    panels = [("as stored", INK, image)]
    for i, color in enumerate(COMPONENT_COLORS):
        shift = MAX_LEVEL * np.sqrt(rgb.eigenvalues[i]) * np.array(rgb.eigenvectors)[:, i]
        panels += [
            (f"component {i + 1}: - SD", color, image - shift),
            (f"component {i + 1}: + SD", color, image + shift),
        ]
    height, width = image.shape[:2]
    step = width + 3 * GAP
    strip = np.full((height, step * len(panels) - 3 * GAP, 3), float(MAX_LEVEL))
    for i, (title, color, shifted) in enumerate(panels):
        strip[:, i * step : i * step + width] = shifted
        axes.text(i * step + width / 2, -10, title, ha="center", va="bottom", fontsize=10, color=color)
    axes.imshow(np.clip(strip, 0, MAX_LEVEL).round().astype(np.uint8))
    axes.axis("off")
