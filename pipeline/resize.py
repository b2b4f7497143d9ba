"""One image's bytes in, one 256 x 256 JPEG and its pixel moments out.

Decided once, for every image:
- The orientation in EXIF is not applied and colour profiles are not read, as is usual with ImageNet: everyone's results
  were made with the pixels as stored. Pillow turns TIFFs by itself; they are turned back.
- Transparency is laid over white. Grey is repeated to three channels, palettes are looked up, CMYK is converted as
  Pillow does, 16-bit grey keeps its upper 8 bits (as Pillow reads 16-bit colour). 32-bit and floating point pixels have
  no known range and are refused.
- Of an animation, or of several pictures or pages in one file, the first counts.
- Bytes behind the image do not matter. A file that ends before its image does is refused, even where only the end
  marker is lost: what else is lost cannot be known.
- A JPEG with wrong bits inside is kept as libjpeg reads it, which goes on at the next marker or leaves grey. Every
  program that trains on ImageNet sees those pixels; Pillow cannot tell such a file from a good one. PNG has checksums,
  and a wrong one is refused.
- The contents decide on the format, not the name. Others than FORMATS are no images here; Pillow would run a
  PostScript interpreter for some.
"""

from __future__ import annotations

import dataclasses
import io
import warnings
from typing import Any

import numpy as np
import PIL
from PIL import ExifTags, Image, ImageFile, features

from pipeline.dataset import IMAGE_SIZE
from pipeline.rgb_stats import RgbMoments

# ImageNet's largest image has 61 million pixels; a header that claims more than this is a mistake or an attack.
# Pillow's own limit is a little higher, and is heeded too.
MAX_PIXELS = 80_000_000
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF")  # "JPEG" also opens multi-picture files.
SUBSAMPLING = "4:2:0"
RESIZE = "bicubic, antialiased, shorter side to 256, central square"

# Some libraries switch it on for the whole process; half an image would then be padded with grey without a word.
ImageFile.LOAD_TRUNCATED_IMAGES = False

# What undoes each turn that Pillow makes.
_TURN_BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


class ImageError(ValueError):
    """Bytes that are no whole image; the message is a short reason."""


@dataclasses.dataclass(frozen=True)
class Converted:
    """One image as it is stored."""

    jpeg: bytes
    """IMAGE_SIZE x IMAGE_SIZE, RGB, no metadata."""
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
        "encoder": {"pillow": PIL.__version__, "libjpeg_turbo": features.version("libjpeg_turbo")},
    }


def convert(data: bytes, quality: int) -> Converted:
    """Decodes an image, resizes it to the central IMAGE_SIZE square and encodes it as JPEG.

    Args:
        data: the bytes of an image file in one of FORMATS.
        quality: of the JPEG, 1 to 95.

    Raises:
        ImageError: if the bytes do not decode to a whole image of a sane size.
    """
    image = _central_square(_decode(data))
    # Pillow's encoder would copy the source's comment.
    image.info.clear()
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=SUBSAMPLING, optimize=False, progressive=False)
    jpeg = buffer.getvalue()
    with Image.open(io.BytesIO(jpeg)) as stored:
        return Converted(jpeg, RgbMoments.of(np.asarray(stored)))


def _decode(data: bytes) -> Image.Image:
    """An image file's first frame in mode RGB."""
    if not data:
        raise ImageError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ImageError(f"it claims more than {MAX_PIXELS} pixels")
                turn = image.getexif().get(ExifTags.Base.Orientation) if image.format == "TIFF" else None
                image.load()
                rgb = _to_rgb(image)
                return rgb.transpose(_TURN_BACK[turn]) if turn in _TURN_BACK else rgb
    except (ImageError, MemoryError):
        raise
    except PIL.UnidentifiedImageError as error:
        raise ImageError("it is no image in a known format") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(f"it claims more than {MAX_PIXELS} pixels") from error
    # Pillow's readers raise whatever the bytes lead them to: OSError, SyntaxError, struct.error, zlib.error, KeyError.
    except Exception as error:
        reason = " ".join(str(error).split()) or "no reason given"
        raise ImageError(f"it does not decode: {reason[:200]} ({type(error).__name__})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # astype makes the byte order the machine's own, which "I;16B" is not.
        grey = np.asarray(image).astype(np.uint16)
        upper = (grey >> 8).astype(np.uint8)
        # PNG can call one level of grey transparent.
        upper[grey == image.info.get("transparency", -1)] = 255
        return Image.fromarray(upper).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(f"its pixels are 32-bit numbers (mode {image.mode}) without a known range")
    if image.has_transparency_data:
        transparent = image.convert("RGBA")
        white = Image.new("RGBA", transparent.size, "white")
        return Image.alpha_composite(white, transparent).convert("RGB")
    return image.convert("RGB")


def _central_square(image: Image.Image) -> Image.Image:
    """Shorter side to IMAGE_SIZE with the aspect kept, then the central square, in one step.

    Resizing just the central square with the same filter computes the same output pixels as resizing the whole and
    cropping, since Pillow's filter still reads the source beyond the box. What differs is rounding: the two steps round
    the longer side and the crop's place to whole pixels, at most half an output pixel; here nothing is rounded.
    """
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
