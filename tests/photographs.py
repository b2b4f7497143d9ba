"""Images made in code that compress and resize as photographs do: smooth, colored, of varied size."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.shard_sets import make, planned


def photograph(seed: int, width: int, height: int) -> NDArray[np.uint8]:
    """A [height, width, 3] image: colored noise at two scales over a gradient."""
    generator = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for cells, weight in ((4, 1.0), (16, 0.35)):
        noise = Image.fromarray(generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += weight * np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), np.float64)
    total += np.linspace(0, 60, width)[None, :, None]
    return np.clip(total * 255 / total.max(), 0, 255).astype(np.uint8)


def encoded(image: NDArray[np.uint8] | Image.Image, form: str = "JPEG", **options: object) -> bytes:
    """An image file's bytes."""
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> NDArray[np.uint8]:
    """An image file's pixels, by Pillow."""
    return np.asarray(Image.open(io.BytesIO(data)))


def write_source(root: Path, images: int, classes: int = 3, longest: int = 420, first_seed: int = 0) -> Path:
    """A folder of class folders n0, n1, ..., each with `images` JPEGs of varied size named CLASS_NUMBER.JPEG."""
    generator = np.random.default_rng(first_seed)
    for number in range(classes):
        folder = root / f"n{number}"
        folder.mkdir(parents=True)
        for i in range(images):
            width, height = (int(side) for side in generator.integers(longest // 2, longest, 2))
            image = photograph(first_seed + 1000 * number + i, width, height)
            (folder / f"n{number}_{i}.JPEG").write_bytes(encoded(image, quality=92))
    return root


def build_shard_set(source: Path, output: Path) -> Path:
    """Shards a folder of class folders, ten images to a shard, a quarter of them to validate with; gives `output`."""
    return make(output, planned(source, per_shard=10, val_fraction=0.25))
