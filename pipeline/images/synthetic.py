"""Generated images with the statistics of photographs, for trying everything before ImageNet is at hand.

Each shows a textured object before pink noise (amplitude 1/f, as in photographs). Outline and texture make the class,
and each class has a color of surroundings that is typical of it, though not certain: what a network learns first, in
the minutes of a demonstration. Place, size, turn, colors, blur and grain are drawn in the same way for every class.
"""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Field = NDArray[np.floating[Any]]
"""[h, w]: a value for each pixel."""

SPLITS = ("train", "val")
SHORTER_SIDE = (180, 520)
ASPECT = (0.6, 1.8)
"""Width over height."""
GRAYSCALE_FRACTION = 0.05
JPEG_QUALITY = (75, 95)
HUE_SPREAD = 0.35
"""Radians: the deviation of a class's surroundings around its hue; neighboring hues are 2 pi / 8 = 0.79 apart."""


# Each texture takes coordinates in units of the object's radius and is above zero where it has its second color.
def _stripes(x: Field, y: Field) -> Field:
    return np.sin(11 * x)


def _checks(x: Field, y: Field) -> Field:
    return np.sin(8 * x) * np.sin(8 * y)


def _rings(x: Field, y: Field) -> Field:
    return np.cos(15 * np.hypot(x, y))


def _spokes(x: Field, y: Field) -> Field:
    return np.sin(9 * np.arctan2(y, x))


CLASSES: tuple[tuple[str, int, Callable[[Field, Field], Field]], ...] = (
    ("n90000001", 3, _stripes),
    ("n90000002", 6, _checks),
    ("n90000003", 3, _rings),
    ("n90000004", 6, _spokes),
    ("n90000005", 6, _stripes),
    ("n90000006", 3, _checks),
    ("n90000007", 6, _rings),
    ("n90000008", 3, _spokes),
)
"""The classes in order of their index: folder name, the object's number of sides, and its texture."""


def draw(seed: int, class_index: int, number: int, split: str = "train") -> NDArray[np.uint8]:
    """One image, [h, w, 3] uint8 RGB: the same arguments give the same pixels."""
    rng = _random(seed, split, class_index, number)
    shorter = rng.integers(SHORTER_SIDE[0], SHORTER_SIDE[1] + 1)
    aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
    width, height = int(shorter * max(aspect, 1)), int(shorter / min(aspect, 1))
    hue = 2 * math.pi * class_index / len(CLASSES) + rng.normal(0, HUE_SPREAD)
    surroundings = rng.uniform(0.35, 0.6) + 0.2 * np.cos(hue - 2 * math.pi * np.arange(3) / 3)
    image = surroundings.astype(np.float32) + 0.12 * _pink_noise(rng, height, width)[..., None]

    # All of the object lies in the central square, which is what is left of an image once it is cropped for AlexNet.
    radius = rng.uniform(0.25, 0.45) * shorter
    top, left = (side / 2 + rng.uniform(-1, 1) * (shorter / 2 - radius) for side in (height, width))
    down = (np.arange(height, dtype=np.float32)[:, None] - top) / radius
    right = (np.arange(width, dtype=np.float32) - left) / radius
    turn = rng.uniform(-0.7, 0.7)
    x, y = math.cos(turn) * right + math.sin(turn) * down, math.cos(turn) * down - math.sin(turn) * right
    _, sides, texture = CLASSES[class_index]
    half = math.pi / sides
    inside = np.hypot(x, y) * np.cos((np.arctan2(y, x) % (2 * half)) - half) < math.cos(half)
    # In either order, else the textures' part of the second color would tell a class by its mean.
    colors = rng.permutation([rng.uniform(0.05, 0.35, 3), rng.uniform(0.65, 0.95, 3)]).astype(np.float32)
    image[inside] = colors[(texture(x, y)[inside] > 0).astype(int)]

    sharp = Image.fromarray(np.clip(image * 255, 0, 255).astype(np.uint8))
    blurred = np.asarray(sharp.filter(ImageFilter.BoxBlur(rng.uniform(0.4, 1.2))), np.float32)
    grain = rng.standard_normal((height, width, 1), dtype=np.float32) * np.float32(rng.uniform(1, 8))
    return np.clip(blurred + grain, 0, 255).astype(np.uint8)


def encode(seed: int, class_index: int, number: int, split: str = "train") -> bytes:
    """The image of the same arguments as a JPEG file of random quality; a few are grayscale, as in ImageNet."""
    rng = _random(seed, split, class_index, number, purpose=1)
    picture = Image.fromarray(draw(seed, class_index, number, split))
    if rng.random() < GRAYSCALE_FRACTION:
        picture = picture.convert("L")
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=int(rng.integers(JPEG_QUALITY[0], JPEG_QUALITY[1] + 1)))
    return buffer.getvalue()


def _random(seed: int, split: str, class_index: int, number: int, purpose: int = 0) -> np.random.Generator:
    """A generator of its own for each image and purpose: images can be drawn in any order, and alone."""
    image = (SPLITS.index(split) << 56) | (purpose << 48) | (class_index << 40) | number
    return np.random.Generator(np.random.Philox(key=np.array([seed, image], dtype=np.uint64)))


def _pink_noise(rng: np.random.Generator, height: int, width: int) -> Field:
    """[height, width], mean 0 and deviation 1 or nearly: octaves of equal power, each drawn small and scaled up."""
    noise = np.zeros((1, 1), dtype=np.float32)
    for octave in range(math.ceil(math.log2(max(height, width) / 3)), -1, -1):
        size = (math.ceil(height / 2**octave), math.ceil(width / 2**octave))
        noise = np.asarray(Image.fromarray(noise).resize(size[::-1], Image.Resampling.BICUBIC))
        if octave > 0:  # A lens resolves no single pixels; the sensor's grain comes later.
            noise = noise + rng.standard_normal(size, dtype=np.float32)
    return (noise - noise.mean()) / noise.std()


def write_folder(
    output: Path, classes: int, train_per_class: int, val_per_class: int, seed: int, log: Callable[[str], None]
) -> None:
    """Writes OUTPUT/train/WNID/*.JPEG and OUTPUT/val/WNID/*.JPEG; does nothing where OUTPUT already holds something.

    The images are written beside OUTPUT and renamed at the end: a folder of the final name is complete.

    Raises:
        OSError: if the folder cannot be written.
    """
    if output.is_dir() and any(output.iterdir()):
        log(f"{output} is already there")
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{output.name}.", dir=output.parent) as temporary:
        partial = Path(temporary) / output.name
        for split, count in (("train", train_per_class), ("val", val_per_class)):
            for index, (wnid, _, _) in enumerate(CLASSES[:classes]):
                folder = partial / split / wnid
                folder.mkdir(parents=True)
                for number in range(count):
                    stem = f"{wnid}_{number}" if split == "train" else f"val_{index * count + number + 1:08d}"
                    (folder / f"{stem}.JPEG").write_bytes(encode(seed, index, number, split))
                log(f"{split} {wnid}: {count} images")
        partial.rename(output)
