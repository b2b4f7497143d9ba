"""An image that a set can hold is stored byte for byte, whatever source it comes from."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from pipeline.dataset.info import read_dataset
from pipeline.images.decode import MAX_JPEG_BYTES, pixels_of_stored
from pipeline.images.resize import convert
from pipeline.images.rgb_stats import RgbMoments, RgbStatistics
from tests.foreign_shards import sample, stored, taken_over, unpacked, write_set, write_shards
from tests.photographs import encoded, photograph


def test_a_set_that_webdataset_wrote_is_taken_over_byte_for_byte(tmp_path: Path) -> None:
    """Its images, labels and splits; keys gain their class, and the order is this program's."""
    foreign = write_set(tmp_path / "foreign")
    output = taken_over(foreign, tmp_path / "out")
    for split, count in (("train", 15), ("val", 9)):
        theirs = {one["jpg"]: int(one["cls"]) for one in unpacked(foreign, split)}
        assert {one["jpg"]: int(one["cls"]) for one in unpacked(output, split)} == theirs
        assert len(theirs) == count
    # The statistics are of those pixels, as Pillow decodes them.
    images = [np.asarray(Image.open(io.BytesIO(one["jpg"]))) for one in unpacked(foreign, "train")]
    assert read_dataset(output).rgb == RgbStatistics.of(sum(map(RgbMoments.of, images), RgbMoments()))


def test_a_set_taken_over_twice_is_the_same(tmp_path: Path) -> None:
    once = taken_over(write_set(tmp_path / "foreign"), tmp_path / "once")
    twice = taken_over(once, tmp_path / "twice")
    for split in ("train", "val"):
        assert {one["jpg"] for one in unpacked(twice, split)} == {one["jpg"] for one in unpacked(once, split)}


def test_a_folders_images_follow_the_same_rule(tmp_path: Path) -> None:
    """One that fits is kept, and one that does not is encoded, beside each other."""
    for label in range(2):
        folder = tmp_path / "images" / f"n{label}"
        folder.mkdir(parents=True)
        for number in range(4):
            (folder / f"{number}.jpg").write_bytes(stored(10 * label + number))
        (folder / "larger.jpg").write_bytes(encoded(photograph(label, 300, 280)))
    output = taken_over(tmp_path / "images", tmp_path / "out")
    jpegs = [one["jpg"] for split in ("train", "val") for one in unpacked(output, split)]
    assert len(jpegs) == 10
    kept = {stored(10 * label + number) for label in range(2) for number in range(4)}
    assert kept < set(jpegs)
    for jpeg in set(jpegs) - kept:
        assert Image.open(io.BytesIO(jpeg)).size == (256, 256)


def turned() -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return stored(1, exif=exif.tobytes())


def upright() -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 1
    return stored(1, exif=exif.tobytes())


KEPT = {
    "as Pillow writes it": lambda: stored(1),
    "without chroma subsampling": lambda: stored(1, subsampling=0),
    "optimized tables": lambda: stored(1, optimize=True),
    "restart markers": lambda: stored(1, restart_marker_blocks=4),
    "a comment": lambda: stored(1, comment=b"made elsewhere"),
    "an EXIF that turns nothing": upright,
}
ENCODED = {
    "progressive": lambda: stored(1, progressive=True),
    "gray": lambda: stored(1, "L"),
    "CMYK": lambda: stored(1, "CMYK"),
    "an EXIF that turns it": turned,
    "bytes behind its end": lambda: stored(1) + b"\0",
    "another size": lambda: encoded(photograph(1, 256, 255)),
    "PNG": lambda: encoded(photograph(1, 256, 256), "PNG"),
    "too many bytes": lambda: stored(1)[:2] + b"".join([b"\xff\xfe\xff\xff" + bytes(65533)] * 65) + stored(1)[2:],
}


@pytest.mark.parametrize("name", KEPT)
def test_what_every_reader_sees_alike_is_kept(name: str) -> None:
    data = KEPT[name]()
    converted = convert(data, 90)
    assert converted.jpeg == data
    assert converted.moments == RgbMoments.of(np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("name", ENCODED)
def test_anything_else_is_encoded(name: str) -> None:
    data = ENCODED[name]()
    assert pixels_of_stored(data) is None
    converted = convert(data, 90)
    assert converted.jpeg != data
    assert pixels_of_stored(converted.jpeg) is not None
    assert len(converted.jpeg) < MAX_JPEG_BYTES


@pytest.mark.parametrize("end", [0, 1, 2, 100, 600, 3000, -2])
def test_what_is_cut_short_is_not_kept(end: int) -> None:
    assert pixels_of_stored(stored(1)[:end]) is None
    assert pixels_of_stored(stored(1)[:end] + b"\xff\xd9") is None or end == -2


def test_flaws_that_libjpeg_notices_are_not_kept() -> None:
    data = bytearray(stored(1))
    data[len(data) // 2 : len(data) // 2 + 200] = b"\xff\xd4" * 100
    assert pixels_of_stored(bytes(data)) is None


def test_longer_names_are_as_good(tmp_path: Path) -> None:
    for split, count in (("train", 9), ("val", 3)):
        write_shards(tmp_path / "set", split, (sample(n, jpg=None, jpeg=stored(n)) for n in range(count)))
    output = taken_over(tmp_path / "set", tmp_path / "out")
    assert {one["jpg"] for one in unpacked(output, "train")} == {stored(n) for n in range(9)}
