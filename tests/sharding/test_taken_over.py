"""An image that a set can hold is stored byte for byte, whatever source it comes from."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from PIL import ExifTags, Image

from pipeline.dataset.info import read_dataset
from pipeline.images.decode import MAX_JPEG_BYTES, pixels_of_stored
from pipeline.images.resize import convert
from pipeline.images.rgb_stats import RgbMoments, RgbStatistics
from tests.foreign_shards import sample, stored, unpacked, write_shards
from tests.photographs import decoded, encoded, photograph
from tests.shard_sets import make, planned


def test_a_set_that_webdataset_wrote_is_taken_over_byte_for_byte(tmp_path: Path) -> None:
    """Its images, labels and splits; keys gain their class, and the order is this program's."""
    foreign = tmp_path / "foreign"
    write_shards(foreign, "train", map(sample, range(15)))
    # .jpeg is as good a name.
    write_shards(foreign, "val", (sample(number, jpg=None, jpeg=stored(number)) for number in range(100, 109)))
    output = make(tmp_path / "out", planned(foreign))
    for split, name, count in (("train", "jpg", 15), ("val", "jpeg", 9)):
        theirs = {one[name]: int(one["cls"]) for one in unpacked(foreign, split)}
        assert {one["jpg"]: int(one["cls"]) for one in unpacked(output, split)} == theirs
        assert len(theirs) == count
    # The statistics are of those pixels, as Pillow decodes them.
    images = [decoded(one["jpg"]) for one in unpacked(foreign, "train")]
    assert read_dataset(output).rgb == RgbStatistics.of(sum(map(RgbMoments.of, images), RgbMoments()))


def oriented(how: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = how
    return stored(1, exif=exif.tobytes())


KEPT = {
    "as Pillow writes it": lambda: stored(1),
    "without chroma subsampling": lambda: stored(1, subsampling=0),
    "optimized tables": lambda: stored(1, optimize=True),
    "restart markers": lambda: stored(1, restart_marker_blocks=4),
    "a comment": lambda: stored(1, comment=b"made elsewhere"),
    "an EXIF that turns nothing": lambda: oriented(1),
}
ENCODED = {
    "progressive": lambda: stored(1, progressive=True),
    "gray": lambda: stored(1, "L"),
    "CMYK": lambda: stored(1, "CMYK"),
    "an EXIF that turns it": lambda: oriented(6),
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
    assert converted.moments == RgbMoments.of(decoded(data))


@pytest.mark.parametrize("name", ENCODED)
def test_anything_else_is_encoded(name: str) -> None:
    data = ENCODED[name]()
    assert pixels_of_stored(data) is None
    converted = convert(data, 90)
    assert converted.jpeg != data
    assert pixels_of_stored(converted.jpeg) is not None
    assert len(converted.jpeg) < MAX_JPEG_BYTES


@pytest.mark.parametrize(("end", "mark"), [*itertools.product((0, 100, 3000), (b"", b"\xff\xd9")), (-2, b"")])
def test_what_is_cut_short_is_not_kept(end: int, mark: bytes) -> None:
    assert pixels_of_stored(stored(1)[:end] + mark) is None


def test_flaws_that_libjpeg_notices_are_not_kept() -> None:
    data = bytearray(stored(1))
    data[len(data) // 2 : len(data) // 2 + 200] = b"\xff\xd4" * 100
    assert pixels_of_stored(bytes(data)) is None
