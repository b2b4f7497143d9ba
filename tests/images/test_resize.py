"""Resizing: equal to an antialiased reference in float64, and never silently wrong. `test_odd_images` has odd files."""

from __future__ import annotations

import io

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
