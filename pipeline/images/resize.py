"""One image's bytes in, one 256 x 256 JPEG and its pixel moments out."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from typing import Any

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from pipeline.images.decode import IMAGE_SIZE, decode, pixels_of_stored
from pipeline.images.rgb_stats import RgbMoments

SUBSAMPLING = "4:2:0"
RESIZE = "central square, then bicubic, antialiased, to 256 x 256"


@dataclasses.dataclass(frozen=True)
class Converted:
    """One image as it is stored."""

    jpeg: bytes
    """IMAGE_SIZE x IMAGE_SIZE, RGB; without metadata, unless it was found so."""
    moments: RgbMoments
    """Of the pixels that decoding `jpeg` gives: what training will see."""


def encoder_settings(quality: int) -> dict[str, Any]:
    """What decides the stored bytes, for `dataset.json`: two sets with equal settings hold equal bytes."""
    return {
        "size": IMAGE_SIZE,
        "resize": RESIZE,
        "format": "JPEG",
        "quality": quality,
        "subsampling": SUBSAMPLING,
        "encoder": {name: importlib.metadata.version(name) for name in ("simplejpeg", "torch", "pillow")},
    }


def convert(data: bytes, quality: int) -> Converted:
    """Decodes an image, resizes its central square to IMAGE_SIZE and encodes it as JPEG; keeps one that a set can hold.

    Args:
        data: the bytes of an image file in one of `decode.FORMATS`.
        quality: of the JPEG, 1 to 95.

    Raises:
        ImageError: if the bytes do not decode to a whole image of a sane size.
    """
    stored = pixels_of_stored(data)
    if stored is not None:
        return Converted(data, RgbMoments.of(stored))
    square = resize(decode(data))
    jpeg = simplejpeg.encode_jpeg(square, quality, "RGB", SUBSAMPLING.replace(":", ""))
    return Converted(jpeg, RgbMoments.of(simplejpeg.decode_jpeg(jpeg)))


def resize(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The central square of a [height, width, 3] image as [IMAGE_SIZE, IMAGE_SIZE, 3].

    The paper (section 2) resizes the shorter side and then crops. Cropping first gives the same but for the outermost
    pixels, where the filter sees no more than the square, and for the rounding of the crop, which is to a pixel of the
    source here; and it costs an image of 1 x 4000 no gigabyte.
    """
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = torch.from_numpy(image[top : top + side, left : left + side])
    # In this order of axes the pixels are in torch's channels_last, for which it has a vectorised kernel of whole
    # numbers: Pillow's filter, several times as fast.
    planes = square[None].permute(0, 3, 1, 2)
    resized = interpolate(planes, (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())
