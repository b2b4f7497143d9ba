"""A picture of a finished set, to see at a glance what is in it.

It shows stored training images of a few shards, so a set of any size takes the same second. Equal sets give equal
bytes, as long as Pillow is the same.
"""

from __future__ import annotations

import dataclasses
import io
import textwrap
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.dataset.info import DatasetInfo
from pipeline.dataset.sample_index import open_index
from pipeline.images.decode import decode_stored
from pipeline.sources.files import read_bytes
from pipeline.storage.locations import Location, join
from pipeline.storage.remote import write

SHEET_FILE = "contact_sheet.jpg"

SHARDS_READ = 16  # Of 1250 mixed images of 1000 classes each: about 20 images of a class.
ROWS, COLUMNS = 10, 8
TILE, GAP = 128, 6  # Pixels.
LABEL_WIDTH, HEAD, MARGIN = 230, 84, 24
LABEL_LETTERS = 20  # A line of a class's name; what is wider still lies under the images.
INK, FAINT, PAPER = "#1b1b1b", "#6b6b6b", "#ffffff"


@dataclasses.dataclass(frozen=True)
class Row:
    """A few images of one class."""

    label: int
    images: tuple[NDArray[np.uint8], ...]
    """Each [height, width, 3]."""


def write_contact_sheet(root: Location, info: DatasetInfo) -> None:
    """Writes ROOT/contact_sheet.jpg for a set whose shards are all there.

    Raises:
        DatasetError, ImageError, OSError: if a shard that is shown cannot be read, or the sheet cannot be written.
    """
    write(join(root, SHEET_FILE), contact_sheet(info, choose(root, info)))


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
