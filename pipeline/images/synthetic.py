"""Generated images with the statistics of photographs, for trying everything before ImageNet is at hand.

Each shows one or two textured objects before a background of pink noise (amplitude 1/f, as in photographs) under uneven
light. Shape and texture make the class, and, as a church has its sky and a fish its water, each class has a color of
surroundings that is typical of it, though not certain: what a network learns first, in the minutes of a demonstration.
Place, size, turn, the object's colors, contrast, blur and noise are drawn in the same way for every class.
"""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Field = NDArray[np.floating[Any]]
"""[h, w]: a value for each pixel."""

SPLITS = ("train", "val")
MARKER = ".generated.json"
"""In a folder made here: the settings it was made with. A folder without one is never written in."""
SHORTER_SIDE = (180, 520)
ASPECT = (0.6, 1.8)
"""Width over height."""
GRAYSCALE_FRACTION = 0.05
JPEG_QUALITY = (75, 95)
HUE_SPREAD = 0.35
"""Radians: the deviation of a class's surroundings around its hue; neighboring hues are 2 pi / 8 = 0.79 apart."""


def _random(seed: int, split: str, class_index: int, number: int, purpose: int) -> np.random.Generator:
    """A generator of its own for each image and purpose: images can be drawn in any order, and alone."""
    image = (SPLITS.index(split) << 56) | (purpose << 48) | (class_index << 40) | number
    return np.random.Generator(np.random.Philox(key=np.array([seed, image], dtype=np.uint64)))


# ---- What the classes look like ----
#
# Each takes coordinates in units of the object's radius, [h, w] each, and returns two signed fields: above zero inside
# the outline, and above zero where the texture has its second color.


def _from_cell_center(x: Field, spacing: float) -> Field:
    cell = x * (1 / spacing)
    return (cell - np.floor(cell) - 0.5) * spacing


def _striped_disc(x: Field, y: Field, rng: np.random.Generator) -> tuple[Field, Field]:
    rate = math.pi * rng.uniform(3.0, 4.0)
    return 1 - np.hypot(x, y), np.sin(rate * x) / rate


def _checkered_triangle(x: Field, y: Field, rng: np.random.Generator) -> tuple[Field, Field]:
    rate = math.pi * rng.uniform(2.0, 2.8)
    inside = np.minimum(0.6 - y, np.minimum(0.6 + 0.5 * y + 0.866 * x, 0.6 + 0.5 * y - 0.866 * x))
    return inside, np.sin(rate * x) * np.sin(rate * y) / rate


def _dotted_square(x: Field, y: Field, rng: np.random.Generator) -> tuple[Field, Field]:
    spacing = rng.uniform(0.42, 0.52)
    distance = np.hypot(_from_cell_center(x, spacing), _from_cell_center(y, spacing))
    return 0.88 - np.maximum(np.abs(x), np.abs(y)), 0.32 * spacing - distance


def _rings(x: Field, y: Field, rng: np.random.Generator) -> tuple[Field, Field]:
    rate = 2 * math.pi * rng.uniform(2.0, 2.8)
    distance = np.hypot(x, y)
    return 1 - distance, np.cos(rate * distance) / rate


def _spiky_star(x: Field, y: Field, rng: np.random.Generator) -> tuple[Field, Field]:
    turn = np.arctan2(y, x) * (int(rng.integers(6, 10)) / (2 * math.pi))
    inside = 0.3 + 1.6 * np.abs(turn - np.floor(turn) - 0.5) - np.hypot(x, y)
    return inside, inside - 0.25


def _wavy_bars(x: Field, y: Field, rng: np.random.Generator) -> tuple[Field, Field]:
    rate = math.pi * rng.uniform(2.6, 3.4)
    inside = np.minimum(1 - np.abs(x), 0.8 - np.abs(y))
    return inside, np.sin(rate * (y + 0.2 * np.sin(5 * x))) / rate


def _crosses(x: Field, y: Field, rng: np.random.Generator) -> tuple[Field, Field]:
    spacing = rng.uniform(0.55, 0.65)
    across, along = np.abs(_from_cell_center(x, spacing)), np.abs(_from_cell_center(y, spacing))
    long, short = 0.42 * spacing, 0.13 * spacing
    plus = np.maximum(np.minimum(long - across, short - along), np.minimum(short - across, long - along))
    hexagon = 0.92 - np.maximum(np.abs(y), np.maximum(np.abs(0.866 * x + 0.5 * y), np.abs(0.866 * x - 0.5 * y)))
    return hexagon, plus


def _blob_cluster(x: Field, y: Field, rng: np.random.Generator) -> tuple[Field, Field]:
    inside = np.full_like(x, -1)
    eyes = np.full_like(x, -1)
    for angle in 2 * math.pi * (np.arange(7) + rng.uniform(0, 0.6, 7)) / 7:
        reach, radius = rng.uniform(0.45, 0.72), rng.uniform(0.24, 0.36)
        distance = np.hypot(x - np.float32(reach * np.cos(angle)), y - np.float32(reach * np.sin(angle)))
        np.maximum(inside, radius - distance, out=inside)
        np.maximum(eyes, 0.5 * radius - distance, out=eyes)
    return inside, eyes


CLASSES: tuple[tuple[str, Callable[[Field, Field, np.random.Generator], tuple[Field, Field]]], ...] = (
    ("n90000001", _striped_disc),
    ("n90000002", _checkered_triangle),
    ("n90000003", _dotted_square),
    ("n90000004", _rings),
    ("n90000005", _spiky_star),
    ("n90000006", _wavy_bars),
    ("n90000007", _crosses),
    ("n90000008", _blob_cluster),
)
"""The classes in order of their index: folder name and appearance."""


# ---- One image ----


def draw(seed: int, class_index: int, number: int, split: str = "train") -> NDArray[np.uint8]:
    """One image, [h, w, 3] uint8 RGB: the same arguments give the same pixels."""
    rng = _random(seed, split, class_index, number, purpose=0)
    height, width = _size(rng)
    image = _background(rng, height, width, class_index)
    for center, radius in _places(rng, height, width):
        _add_object(image, class_index, center, radius, rng)

    angle, slope = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.45)
    light = rng.uniform(0.8, 1.1) + slope * (
        math.cos(angle) * np.linspace(-1, 1, width, dtype=np.float32)
        + math.sin(angle) * np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    )
    image *= light * np.float32(255)
    blur = max(0.0, rng.uniform(-0.8, 1.2))
    grain = rng.standard_normal((height, width), dtype=np.float32) * np.float32(rng.uniform(1, 8))
    planes = []
    for plane in image:
        if blur:
            sharp = Image.fromarray(np.clip(plane, 0, 255).astype(np.uint8))
            plane = np.asarray(sharp.filter(ImageFilter.BoxBlur(blur)))
        planes.append(Image.fromarray(np.clip(plane + grain, 0, 255).astype(np.uint8)))
    return np.array(Image.merge("RGB", planes))


def encode(seed: int, class_index: int, number: int, split: str = "train") -> bytes:
    """The image of the same arguments as a JPEG file of random quality; a few are grayscale, as in ImageNet."""
    rng = _random(seed, split, class_index, number, purpose=1)
    picture = Image.fromarray(draw(seed, class_index, number, split))
    if rng.random() < GRAYSCALE_FRACTION:
        picture = picture.convert("L")
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=int(rng.integers(JPEG_QUALITY[0], JPEG_QUALITY[1] + 1)))
    return buffer.getvalue()


def _size(rng: np.random.Generator) -> tuple[int, int]:
    """Height and width."""
    shorter = rng.integers(SHORTER_SIDE[0], SHORTER_SIDE[1] + 1)
    aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
    return (int(shorter), int(shorter * aspect)) if aspect >= 1 else (int(shorter / aspect), int(shorter))


def _color(rng: np.random.Generator, darkest: float, lightest: float) -> NDArray[np.float32]:
    """[3]: a random hue whose mean over the channels lies in the given range."""
    hue = rng.standard_normal(3)
    hue -= hue.mean()
    color = rng.uniform(darkest, lightest) + rng.uniform(0, 0.25) * hue / np.abs(hue).max()
    return np.clip(color, 0, 1).astype(np.float32)


def _surroundings(rng: np.random.Generator, class_index: int) -> NDArray[np.float32]:
    """[3]: a color near the class's own, on the circle of hues."""
    angle = 2 * math.pi * class_index / len(CLASSES) + rng.normal(0, HUE_SPREAD)
    hue = np.cos(angle - 2 * math.pi * np.arange(3) / 3)
    return (rng.uniform(0.35, 0.6) + rng.uniform(0.1, 0.25) * hue).astype(np.float32)


def _pink_noise(rng: np.random.Generator, height: int, width: int) -> Field:
    """[height, width], mean 0 and deviation 1 or nearly: octaves of equal power, each drawn small and scaled up."""
    octaves = math.ceil(math.log2(max(height, width) / 3))
    noise = np.zeros((1, 1), dtype=np.float32)
    for octave in range(octaves, -1, -1):
        size = (math.ceil(height / 2**octave), math.ceil(width / 2**octave))
        noise = np.asarray(Image.fromarray(noise).resize(size[::-1], Image.Resampling.BICUBIC))
        if octave > 0:  # A lens resolves no single pixels; the sensor's grain comes later.
            noise = noise + rng.standard_normal(size, dtype=np.float32)
    sample = noise[::3, ::3]
    return (noise - sample.mean()) * (1 / sample.std())


def _background(rng: np.random.Generator, height: int, width: int, class_index: int) -> NDArray[np.float32]:
    """[3, height, width] in about [0, 1]: pink noise in brightness, and weaker and coarser in hue."""
    base = _surroundings(rng, class_index)
    tint = (_color(rng, 0.5, 0.5) - np.float32(0.5)) * np.float32(0.4)
    bright = _pink_noise(rng, height, width) * np.float32(rng.uniform(0.07, 0.18))
    coarse = Image.fromarray(_pink_noise(rng, height // 4, width // 4))
    hue = np.asarray(coarse.resize((width, height), Image.Resampling.BILINEAR))
    return np.stack([base[c] + bright + tint[c] * hue for c in range(3)])


def _places(rng: np.random.Generator, height: int, width: int) -> list[tuple[tuple[float, float], float]]:
    """Center (y, x) and radius of each object, in pixels: 40 to 90 % of the shorter side across.

    All of them lie in the central square, which is what is left of an image once it is cropped for AlexNet.
    """
    shorter = min(height, width)
    if rng.random() < 0.75:
        across = [rng.uniform(0.5, 0.9) * shorter]
        corners = [(-1.0, -1.0)]
    else:
        across = list(rng.uniform(0.4, 0.5, 2) * shorter)
        corners = [(-1.0, -1.0), (1.0, 1.0)]
    mirror = rng.choice([-1.0, 1.0])
    places = []
    for (down, right), size in zip(corners, across, strict=True):
        room = (shorter - size) / 2
        lowest = -1.0 if len(across) == 1 else 0.6  # One roams; each of two keeps to its corner.
        y, x = (rng.uniform(lowest, 1.0, 2) * room * (down, right * mirror)).tolist()
        places.append(((height / 2 + y, width / 2 + x), size / 2))
    return places


def _add_object(
    image: NDArray[np.float32], class_index: int, center: tuple[float, float], radius: float, rng: np.random.Generator
) -> None:
    """Draws one object of the class into the image [3, h, w], in place."""
    reach = int(1.5 * radius)
    top, left = max(0, int(center[0]) - reach), max(0, int(center[1]) - reach)
    part = image[:, top : int(center[0]) + reach, left : int(center[1]) + reach]
    down = (np.arange(top, top + part.shape[1], dtype=np.float32)[:, None] - np.float32(center[0])) / np.float32(radius)
    right = (np.arange(left, left + part.shape[2], dtype=np.float32) - np.float32(center[1])) / np.float32(radius)
    angle = rng.uniform(-0.7, 0.7)
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    inside, texture = CLASSES[class_index][1](cos * right + sin * down, cos * down - sin * right, rng)

    colors = [_color(rng, 0.08, 0.3), _color(rng, 0.7, 0.92)]
    rng.shuffle(colors)  # Else the textures' share of the second color would tell a class by its mean.
    sharpness = np.float32(radius / 1.2)
    ink = np.clip(texture * sharpness + 0.5, 0, 1)
    cover = np.clip(inside * sharpness + 0.5, 0, 1)
    shadow = 1 - np.float32(rng.uniform(0.1, 0.5)) * np.clip(1 + inside / np.float32(0.25), 0, 1)
    lit = 1 + np.float32(rng.uniform(-0.25, 0.25)) * right + np.float32(rng.uniform(-0.25, 0.25)) * down
    for c in range(3):
        surface = (colors[0][c] + (colors[1][c] - colors[0][c]) * ink) * lit
        behind = part[c] * shadow
        part[c] = behind + (surface - behind) * cover


# ---- A folder of them ----


def write_folder(
    output: Path, classes: int, train_per_class: int, val_per_class: int, seed: int, log: Callable[[str], None]
) -> None:
    """Writes OUTPUT/train/WNID/*.JPEG and OUTPUT/val/WNID/*.JPEG; does nothing where they are already there.

    The images are written to OUTPUT.partial, which is renamed at the end: a folder of the final name is complete.

    Raises:
        ValueError: if a number is out of range, or `output` holds something else, or images of other settings.
        OSError: if the folder cannot be written.
    """
    if not 2 <= classes <= len(CLASSES):
        raise ValueError(f"{classes} classes: choose 2 to {len(CLASSES)}")
    if train_per_class < 1 or val_per_class < 1:
        raise ValueError(
            f"{train_per_class} training and {val_per_class} validation images a class: at least 1 of each"
        )
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed {seed}: choose 0 to 2^64 - 1")
    settings = {"classes": classes, "train_per_class": train_per_class, "val_per_class": val_per_class, "seed": seed}
    partial = output.with_name(output.name + ".partial")
    for folder in (output, partial):
        _check_foreign(folder)
    if (output / MARKER).exists():
        made = json.loads((output / MARKER).read_text())
        if made != settings:
            raise ValueError(f"{output} holds images of other settings ({made}): remove it, or name another folder")
        log(f"{output} is already there, complete, with these settings")
        return

    if partial.exists():  # Of a run that was killed, perhaps one of other settings. It has the marker: it is ours.
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    (partial / MARKER).write_text(json.dumps(settings))
    for split, count in (("train", train_per_class), ("val", val_per_class)):
        for index, (wnid, _) in enumerate(CLASSES[:classes]):
            folder = partial / split / wnid
            folder.mkdir(parents=True)
            for number in range(count):
                stem = f"{wnid}_{number}" if split == "train" else f"val_{index * count + number + 1:08d}"
                (folder / f"{stem}.JPEG").write_bytes(encode(seed, index, number, split))
            log(f"{split} {wnid}: {count} images")
    partial.rename(output)


def _check_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise ValueError(f"{folder} is not empty and was not made by this command: name a new folder")
