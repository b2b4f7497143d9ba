"""How near stored images come to an exact resize, beside what a Pillow script stores.

    python -m tests.benchmarks.shard_fidelity --source FOLDER

FOLDER holds one folder of photographs a class. Each photograph's central square is resized in float64 by a matrix on
each side (antialiased, bicubic, a = -0.5): that is the reference, not rounded. Against it stand this program's stored
JPEG and Pillow's of the same square, quality and subsampling, each decoded by Pillow; and both before they are encoded.
PSNR is over the three channels; SSIM is scikit-image's with Gaussian weights, on luminance.

    pip install -e .[bench]
"""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jobs.cli.command import run
from pipeline.images.decode import IMAGE_SIZE, ImageError, decode
from pipeline.images.resize import convert, resize
from tests.benchmarks.contest import check_least
from tests.benchmarks.shard_writers import photographs
from tests.reference_resize import central_square

LUMINANCE = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as in JPEG


@dataclasses.dataclass(frozen=True)
class FidelityConfig:
    source: Path
    """Folder with one folder of photographs a class."""
    images: int = 300
    """How many photographs, evenly spread over the folder's; those that do not decode are left out and counted."""
    quality: int = 90
    """Of the JPEGs."""

    def __post_init__(self) -> None:
        check_least(self, "images")


def by_pillow(image: Image.Image) -> Image.Image:
    """The central square, resized by Pillow alone."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC, box)


def pillow_jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def pixels(jpeg: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(jpeg)) as image:
        return np.asarray(image)


def psnr(image: NDArray[np.uint8], reference: NDArray[np.float64]) -> float:
    """Decibels, for a peak of 255; infinite for equal images."""
    # A photograph of 256 x 256 is its own reference.
    with np.errstate(divide="ignore"):
        return float(10 * np.log10(255**2 / np.mean((image - reference) ** 2)))


def ssim(image: NDArray[np.uint8], reference: NDArray[np.float64]) -> float:
    from skimage.metrics import structural_similarity

    # Wang et al. (2004): a Gaussian of 1.5 pixels, population covariance.
    return float(
        structural_similarity(
            image @ LUMINANCE,
            reference @ LUMINANCE,
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


def main(config: FidelityConfig) -> None:
    paths = [path for path, _ in photographs(config.source)]
    chosen = [paths[i] for i in np.linspace(0, len(paths) - 1, min(config.images, len(paths))).astype(int)]
    kinds = ("ours, stored", "Pillow, stored", "ours, before encoding", "Pillow, before encoding")
    scores: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    dropped = 0
    for path in chosen:
        data = Path(path).read_bytes()
        try:
            source = decode(data)
        except ImageError:
            dropped += 1
            continue
        image = Image.fromarray(source)
        reference = central_square(source)
        resized = by_pillow(image)
        found = (
            pixels(convert(data, config.quality).jpeg),
            pixels(pillow_jpeg(resized, config.quality)),
            resize(source),
            np.asarray(resized),
        )
        for kind, one in zip(kinds, found, strict=True):
            scores[kind].append((psnr(one, reference), ssim(one, reference)))
    if dropped == len(chosen):
        raise ValueError(f"none of {dropped} files in {config.source} decodes: give a folder of photographs")
    print(f"{len(chosen) - dropped} photographs, {dropped} left out as they do not decode; medians (worst)")
    print("| image | PSNR, dB | SSIM |\n| --- | --- | --- |")
    for kind, values in scores.items():
        (middle, alike), (worst, least) = np.median(values, axis=0), np.min(values, axis=0)
        print(f"| {kind} | {middle:.2f} ({worst:.2f}) | {alike:.4f} ({least:.4f}) |")
    difference = np.subtract(scores["ours, stored"], scores["Pillow, stored"])[:, 0]
    print(f"stored, ours less Pillow's: {np.median(difference):+.3f} dB, at worst {difference.min():+.3f} dB")


if __name__ == "__main__":
    run(FidelityConfig, main)
