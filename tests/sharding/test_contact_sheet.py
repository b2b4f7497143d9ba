"""A set's contact sheet shows what is stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.dataset.info import read_dataset
from pipeline.dataset.split_reader import SplitReader
from pipeline.sharding.contact_sheet import SHEET_FILE, choose
from tests.foreign_shards import sample, stored, write_shards
from tests.photographs import decoded
from tests.shard_sets import make, planned


def tile(sheet: NDArray[np.uint8], row: int, column: int) -> NDArray[np.float64]:
    """[128, 128, 3]: a place of the contact sheet, rows below its heading, columns beside its labels."""
    top, left = 84 + 134 * row, 254 + 134 * column
    return sheet[top : top + 128, left : left + 128].astype(np.float64)


def small(jpeg: bytes) -> NDArray[np.float64]:
    """[128, 128, 3]: a stored image at half its size."""
    return np.asarray(Image.fromarray(decoded(jpeg)).resize((128, 128), Image.Resampling.BOX), np.float64)


def test_the_sheet_shows_each_class_in_its_row(shard_set: Path) -> None:
    reader = SplitReader(shard_set, read_dataset(shard_set), "train")
    sheet = decoded((shard_set / SHEET_FILE).read_bytes())
    # Three classes of eight images in view.
    assert sheet.shape == (84 + 3 * 134 - 6 + 24, 24 + 230 + 8 * 134 - 6 + 24, 3)
    images = [small(reader.image(i).tobytes()) for i in range(len(reader))]
    for label in range(3):
        for column, number in enumerate(np.flatnonzero(reader.labels == label)[:8]):
            errors = [np.abs(tile(sheet, label, column) - image).mean() for image in images]
            assert int(np.argmin(errors)) == number
            assert min(errors) < 3


def test_the_sheet_has_room_for_ten_classes_and_any_number_of_images(tmp_path: Path) -> None:
    """23 classes, of which one has a single image: ten of the full ones are shown, from the first to the last."""
    samples = [
        sample(0, __key__=f"{label:03d}_{number}", cls=label, jpg=stored(label))
        for label in range(23)
        for number in range(1 if label == 4 else 9)
    ]
    write_shards(tmp_path / "set", "train", samples, per_shard=500)
    write_shards(tmp_path / "set", "val", samples[:3])
    root = make(tmp_path / "out", planned(tmp_path / "set", per_shard=500))
    rows = choose(root, read_dataset(root))
    labels = [row.label for row in rows]
    assert (len(labels), labels[0], labels[-1]) == (10, 0, 22)
    assert 4 not in labels
    assert set(np.diff(labels)) <= {2, 3, 4}
    for row in rows:
        assert len(row.images) == 8
        np.testing.assert_array_equal(row.images[0], decoded(stored(row.label)))
