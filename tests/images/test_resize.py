"""Resizing: equal to an antialiased reference in float64, right for every kind of pixel, and never silently wrong."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.images.decode import IMAGE_SIZE, ImageError
from pipeline.images.resize import convert, encoder_settings
from pipeline.images.rgb_stats import RgbMoments
from tests.photographs import encoded, photograph
from tests.reference_resize import central_square

PLAIN_SIZES = [
    (512, 512),
    (500, 375),
    (375, 500),
    (333, 500),
    (1200, 800),
    (256, 256),
    (224, 224),
    (97, 61),
    (257, 256),
]


def pixels(jpeg: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(jpeg)) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


@pytest.mark.paper
@pytest.mark.parametrize(("width", "height"), PLAIN_SIZES)
def test_equals_a_float64_antialiased_resize(width: int, height: int) -> None:
    image = photograph(width * height, width, height)
    # Quality 95 JPEG lies between: on smooth images it is worth a level on average, and chroma is halved.
    difference = np.abs(pixels(convert(encoded(image, "PNG"), 95).jpeg) - central_square(image))
    assert difference.mean() < 1.0
    assert difference.max() < 12.0


@pytest.mark.parametrize(("width", "height"), PLAIN_SIZES)
def test_equals_resizing_then_cropping_up_to_rounding(width: int, height: int) -> None:
    image = Image.fromarray(photograph(width + height, width, height))
    shorter = min(width, height)
    whole = image.resize(
        (round(width * IMAGE_SIZE / shorter), round(height * IMAGE_SIZE / shorter)), Image.Resampling.BICUBIC
    )
    left, top = (whole.width - IMAGE_SIZE) // 2, (whole.height - IMAGE_SIZE) // 2
    expected = np.asarray(whole.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE)), np.float64)
    difference = np.abs(pixels(convert(encoded(image, "PNG"), 95).jpeg) - expected)
    assert difference.mean() < 1.5


def test_fine_stripes_become_gray_and_not_moire() -> None:
    stripes = np.zeros((1024, 1024, 3), np.uint8)
    stripes[:, ::2] = 255
    # At the border the filter sees one side only, and one stripe more of it.
    inside = pixels(convert(encoded(stripes, "PNG"), 90).jpeg).astype(int)[:, 8:-8]
    assert np.abs(inside - 127.5).max() <= 3


def test_moments_are_those_of_the_stored_pixels() -> None:
    converted = convert(encoded(photograph(1, 500, 375)), 90)
    assert converted.moments == RgbMoments.of(pixels(converted.jpeg))
    assert converted.moments.pixels == IMAGE_SIZE**2


def test_stored_jpeg_is_plain() -> None:
    source = Image.fromarray(photograph(2, 300, 400))
    exif = Image.Exif()
    exif[0x0112] = 6  # "Rotate by 90 degrees"
    loud = encoded(source, exif=exif, comment=b"by somebody", icc_profile=b"profile", dpi=(300, 300), quality=95)
    quiet = encoded(source, quality=95)
    assert convert(loud, 90).jpeg == convert(quiet, 90).jpeg
    with Image.open(io.BytesIO(convert(loud, 90).jpeg)) as image:
        assert image.size == (IMAGE_SIZE, IMAGE_SIZE)
        assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
        # 4:2:0: the luminance is sampled twice as often each way.
        assert [(layer[1], layer[2]) for layer in image.layer] == [(2, 2), (1, 1), (1, 1)]  # type: ignore[attr-defined]


def test_quality_counts() -> None:
    data = encoded(photograph(3, 400, 400))
    assert len(convert(data, 95).jpeg) > len(convert(data, 50).jpeg)
    assert encoder_settings(95) != encoder_settings(50)


def near(data: bytes, color: tuple[int, int, int], tolerance: int = 3) -> bool:
    """Whether an image converts to one color."""
    return bool(np.abs(pixels(convert(data, 95).jpeg).astype(int) - color).max() <= tolerance)


def test_every_kind_of_pixel_becomes_rgb() -> None:
    size = (300, 280)
    assert near(encoded(Image.new("L", size, 90)), (90, 90, 90))
    assert near(encoded(Image.new("1", size, 1), "PNG"), (255, 255, 255))
    assert near(encoded(Image.new("RGB", size, (200, 30, 60)).quantize(4), "GIF"), (200, 30, 60))
    assert near(encoded(Image.new("CMYK", size, (0, 255, 255, 0))), (255, 0, 0))
    assert near(encoded(Image.new("YCbCr", size, (120, 128, 128))), (120, 120, 120))
    assert near(encoded(Image.new("RGB", size, (9, 200, 9)), "WEBP", lossless=True), (9, 200, 9))
    assert near(encoded(Image.new("RGB", size, (9, 200, 9)), "BMP"), (9, 200, 9))


def test_transparency_is_laid_over_white() -> None:
    size = (256, 256)
    assert near(encoded(Image.new("RGBA", size, (200, 0, 0, 0)), "PNG"), (255, 255, 255))
    assert near(encoded(Image.new("RGBA", size, (200, 0, 0, 255)), "PNG"), (200, 0, 0))
    assert near(encoded(Image.new("LA", size, (0, 127)), "PNG"), (128, 128, 128))
    palette = Image.new("P", size, 1)
    palette.putpalette([0, 0, 0, 0, 0, 200])
    assert near(encoded(palette, "PNG", transparency=1), (255, 255, 255))
    assert near(encoded(palette, "PNG", transparency=0), (0, 0, 200))


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_gray_keeps_its_upper_bits(form: str) -> None:
    assert near(encoded(Image.fromarray(np.full((300, 300), 0x6412, np.uint16)), form), (0x64, 0x64, 0x64))


def test_16_bit_gray_of_the_other_byte_order() -> None:
    image = Image.frombytes("I;16B", (300, 300), struct.pack(">H", 0x6412) * 300 * 300)
    assert near(encoded(image, "TIFF"), (0x64, 0x64, 0x64))


def png_header(width: int, height: int) -> bytes:
    """The start of a PNG that claims a size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checked = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + checked + struct.pack(">I", 1000) + b"IDAT" + bytes(10)


WHOLE = encoded(photograph(5, 320, 300))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>404 Not Found</html>", "no image in a known format"),
        (b"\xff\xd8\xff", "no image|decode"),
        (WHOLE[: len(WHOLE) // 2], "truncated"),
        (encoded(photograph(5, 320, 300), "PNG")[:5000], "does not decode"),
        (png_header(300, 300), "does not decode"),
        (png_header(9000, 9000), "more than 80000000 pixels"),
        (png_header(60000, 60000), "more than 80000000 pixels"),
        (png_header(0, 10), "no image|does not decode|pixels"),
        (encoded(Image.fromarray(np.ones((300, 300), np.float32)), "TIFF"), "32-bit numbers"),
    ],
    ids=["empty", "html", "stub", "half-jpeg", "half-png", "header", "large", "bomb", "no-width", "float"],
)
def test_what_is_no_whole_image_is_refused_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason) as caught:
        convert(data, 90)
    assert "\n" not in str(caught.value)


def test_damaged_files_never_raise_anything_else() -> None:
    generator = np.random.default_rng(0)
    small = photograph(6, 64, 48)
    for data in (
        encoded(small),
        encoded(small, "PNG"),
        encoded(small, "GIF"),
        encoded(small, "WEBP"),
        encoded(small, "TIFF"),
    ):
        for _ in range(40):
            damaged = bytearray(data)
            for place in generator.integers(0, len(damaged), 12):
                damaged[place] = generator.integers(0, 256)
            try:
                converted = convert(bytes(damaged), 90)
            except ImageError:
                continue
            assert pixels(converted.jpeg).shape == (IMAGE_SIZE, IMAGE_SIZE, 3)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3000, 1), (1, 3000), (255, 257)])
def test_extreme_shapes(width: int, height: int) -> None:
    assert pixels(convert(encoded(Image.new("RGB", (width, height), "red"), "PNG"), 90).jpeg).shape == (256, 256, 3)
