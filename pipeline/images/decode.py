"""One image file's bytes -> its pixels, whatever kind of file it is.

Decided once, for every image:
- The orientation in EXIF is not applied and color profiles are not read, as is usual with ImageNet: everyone's results
  were made with the pixels as stored. Pillow turns TIFFs by itself; they are turned back.
- Transparency is laid over white. Gray is repeated to three channels, palettes are looked up, CMYK is converted as
  Pillow does, 16-bit gray keeps its upper 8 bits (as Pillow reads 16-bit color). 32-bit and floating point pixels have
  no known range and are refused.
- Of an animation, or of several pictures or pages in one file, the first counts.
- Bytes behind the image do not matter. A file that ends before its image does is refused, even where only the end
  marker is lost: what else is lost cannot be known.
- A JPEG with wrong bits inside is kept as libjpeg reads it, which goes on at the next marker or leaves gray. Every
  program that trains on ImageNet sees those pixels; Pillow cannot tell such a file from a good one. PNG has checksums,
  and a wrong one is refused.
- The contents decide on the format, not the name. Others than FORMATS are no images here; Pillow would run a
  PostScript interpreter for some.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import PIL
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile

IMAGE_SIZE = 256  # The paper, section 2: shorter side to 256, then the central 256 x 256.
IMAGE_SHAPE = (IMAGE_SIZE, IMAGE_SIZE, 3)
IMAGE_BYTES = IMAGE_SIZE * IMAGE_SIZE * 3
MAX_JPEG_BYTES = 4 * 2**20  # Twenty times what the pixels take: no index has memory taken for more.

# ImageNet's largest image has 61 million pixels; a header that claims more than this is a mistake or an attack.
# Pillow's own limit is a little higher, and is heeded too.
MAX_PIXELS = 80_000_000
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF")  # "JPEG" also opens multi-picture files.

# Some libraries switch it on for the whole process; half an image would then be padded with gray without a word.
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

_BASELINE = 0xC0
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # Those three are tables and a reserved one.


class ImageError(ValueError):
    """Bytes that are no whole image; the message is a short reason."""


def decode(data: bytes) -> NDArray[np.uint8]:
    """The pixels of an image file in one of FORMATS, [height, width, 3] in RGB.

    Raises:
        ImageError: if the bytes do not decode to a whole image of a sane size.
    """
    pixels = _flawless_jpeg(data)
    return np.array(_by_pillow(data)) if pixels is None else pixels


def pixels_of_stored(data: bytes) -> NDArray[np.uint8] | None:
    """The pixels of a file that a shard set can hold as it is, [256, 256, 3]; None for any other.

    It is a baseline JPEG of YCbCr, of a set's size, whole and without a flaw, that no reader turns by its EXIF.
    """
    if len(data) > MAX_JPEG_BYTES or not data.startswith(b"\xff\xd8") or not data.endswith(b"\xff\xd9"):
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        if (height, width, colors) != (IMAGE_SIZE, IMAGE_SIZE, "YCbCr") or _frame(data) != _BASELINE:
            return None
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                return None
        return simplejpeg.decode_jpeg(data, "RGB", strict=True)
    # Pillow raises whatever the bytes lead it to.
    except Exception:
        return None


def _frame(jpeg: bytes) -> int:
    """The marker of a JPEG's frame, which tells baseline from progressive; 0 if there is none."""
    at = 2
    while at + 4 <= len(jpeg) and jpeg[at] == 0xFF:
        marker = jpeg[at + 1]
        if marker in _FRAMES:
            return marker
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return 0


def decode_stored(jpeg: bytes) -> NDArray[np.uint8]:
    """The pixels of a JPEG as a shard set holds it, [256, 256, 3].

    Raises:
        ImageError: if it is of another size, by its header, or does not decode.
    """
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(jpeg)
    except ValueError as error:
        raise ImageError(f"it does not decode: {error}") from error
    if (width, height) != (IMAGE_SIZE, IMAGE_SIZE):
        raise ImageError(f"it is {width} x {height}, not {IMAGE_SIZE} x {IMAGE_SIZE}")
    return decode(jpeg)


def _flawless_jpeg(data: bytes) -> NDArray[np.uint8] | None:
    """A usual JPEG's pixels; None for what Pillow must judge: other formats, inks, and any flaw libjpeg notices.

    Nearly all of ImageNet goes through here. It is the same libjpeg-turbo as Pillow's, without Pillow's copies.
    """
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > MAX_PIXELS or colors not in ("YCbCr", "Gray", "RGB"):
            return None
        return simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError:
        return None


def _by_pillow(data: bytes) -> Image.Image:
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
        gray = np.asarray(image).astype(np.uint16)
        upper = (gray >> 8).astype(np.uint8)
        # PNG can call one level of gray transparent.
        upper[gray == image.info.get("transparency", -1)] = 255
        return Image.fromarray(upper).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(f"its pixels are 32-bit numbers (mode {image.mode}) without a known range")
    if image.has_transparency_data:
        # convert would copy what has this mode already: 320 MB for the largest image.
        transparent = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", transparent.size, "white")
        white.paste(transparent, mask=transparent)
        return white
    return image.convert("RGB")
