"""Resizing: equal to an antialiased reference in float64, and never silently wrong. `test_odd_images` has odd files."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.images.decode import IMAGE_SIZE, ImageError
from pipeline.images.resize import convert
from tests.photographs import decoded, encoded, photograph
from tests.reference_resize import central_square


@pytest.mark.paper
@pytest.mark.parametrize(
    ("width", "height"), [(500, 375), (375, 500), (1200, 800), (256, 256), (224, 224), (97, 61), (257, 256)]
)
def test_equals_a_float64_antialiased_resize(width: int, height: int) -> None:
    image = photograph(width * height, width, height)
    stored = decoded(convert(encoded(image, "PNG"), 95).jpeg)
    # Quality 95 JPEG lies between: on smooth images it is worth a level on average, and chroma is halved.
    difference = np.abs(stored - central_square(image))
    assert difference.mean() < 1.0
    assert difference.max() < 12.0
    # The paper resizes the whole image and then crops, which is the same up to rounding.
    shorter = min(width, height)
    size = (round(width * IMAGE_SIZE / shorter), round(height * IMAGE_SIZE / shorter))
    whole = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - IMAGE_SIZE) // 2, (size[1] - IMAGE_SIZE) // 2
    cropped = np.asarray(whole.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE)), np.float64)
    assert np.abs(stored - cropped).mean() < 1.5


def test_fine_stripes_become_gray_and_not_moire() -> None:
    stripes = np.zeros((1024, 1024, 3), np.uint8)
    stripes[:, ::2] = 255
    # At the border the filter sees one side only, and one stripe more of it.
    inside = decoded(convert(encoded(stripes, "PNG"), 90).jpeg).astype(int)[:, 8:-8]
    assert np.abs(inside - 127.5).max() <= 3


def test_stored_jpeg_is_plain() -> None:
    source = Image.fromarray(photograph(2, 300, 400))
    exif = Image.Exif()
    exif[0x0112] = 6  # "Rotate by 90 degrees"
    loud = encoded(source, exif=exif, comment=b"by somebody", icc_profile=b"profile", dpi=(300, 300), quality=95)
    stored = convert(loud, 90).jpeg
    assert stored == convert(encoded(source, quality=95), 90).jpeg
    assert len(stored) < len(convert(loud, 95).jpeg)
    with Image.open(io.BytesIO(stored)) as image:
        assert image.size == (IMAGE_SIZE, IMAGE_SIZE)
        assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
        # 4:2:0: the luminance is sampled twice as often each way.
        assert [(layer[1], layer[2]) for layer in image.layer] == [(2, 2), (1, 1), (1, 1)]  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "TIFF"])
def test_damaged_files_never_raise_anything_else(form: str) -> None:
    generator = np.random.default_rng(0)
    data = encoded(photograph(6, 64, 48), form)
    for _ in range(40):
        damaged = bytearray(data)
        for place in generator.integers(0, len(damaged), 12):
            damaged[place] = generator.integers(0, 256)
        try:
            converted = convert(bytes(damaged), 90)
        except ImageError:
            continue
        assert decoded(converted.jpeg).shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
