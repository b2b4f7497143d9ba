"""Every odd kind of image file: what it becomes, by an independent decoder or a formula, or why it is set aside."""

from __future__ import annotations

import io
import json
import os
import resource
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image, ImageCms

from pipeline.dataset.info import read_dataset
from pipeline.dataset.split_reader import SplitReader
from pipeline.images.decode import MAX_PIXELS, ImageError
from pipeline.images.resize import convert
from tests.photographs import encoded, photograph
from tests.reference_resize import central_square
from tests.shard_sets import make, planned

WIDTH, HEIGHT = 330, 290
PHOTO = photograph(1, WIDTH, HEIGHT)
OTHER = photograph(2, WIDTH, HEIGHT)
GRAY = PHOTO[..., :1]
ALPHA = photograph(3, WIDTH, HEIGHT)[..., :1]
INK = np.dstack([PHOTO, photograph(4, WIDTH, HEIGHT)[..., 0] // 2])  # cyan, magenta, yellow, black
ON_WHITE = PHOTO * (ALPHA / 255) + 255 * (1 - ALPHA / 255)
OF_INK = (255 - INK[..., :3].astype(float)) * (255 - INK[..., 3:].astype(float)) / 255


def picture(pixels: NDArray[Any], mode: str | None = None) -> Image.Image:
    """A Pillow image; `mode` only where the shape leaves it open."""
    if mode is None:
        return Image.fromarray(np.ascontiguousarray(pixels.astype(np.uint8)).squeeze())
    return Image.frombytes(mode, pixels.shape[1::-1], np.ascontiguousarray(pixels).tobytes())


def png(pixels: NDArray[Any], bits: int, color: int, palette: bytes = b"", transparent: bytes = b"") -> bytes:
    """A PNG written by hand, of 8 or 16 bits: color type 0 is gray, 2 RGB, 3 a palette, 4 gray and alpha, 6 RGBA."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in pixels.astype(">u2" if bits == 16 else np.uint8))
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))]
    parts += [chunk(kind, data) for kind, data in ((b"PLTE", palette), (b"tRNS", transparent)) if data]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def frames(form: str, **options: Any) -> bytes:
    """A file of two pictures, the photograph first."""
    return encoded(picture(PHOTO), form, save_all=True, append_images=[picture(OTHER)], **options)


def ycck() -> bytes:
    """The inks as Adobe stores them: inverted, the colors as YCbCr, and a marker that says so."""
    cyan, magenta, yellow = (INK[..., i].astype(float) for i in range(3))
    y = 0.299 * cyan + 0.587 * magenta + 0.114 * yellow
    planes = np.dstack([y, 128 + 0.564 * (yellow - y), 128 + 0.713 * (cyan - y), 255.0 - INK[..., 3]])
    # Pillow writes CMYK inverted, so that these planes must be inverted to get into the file as they are.
    inverted = (255 - np.clip(np.round(planes), 0, 255)).astype(np.uint8)
    data = bytearray(encoded(picture(inverted, "CMYK"), quality=98, subsampling=0))
    adobe = data.index(b"Adobe")
    assert data[adobe + 11] == 0
    data[adobe + 11] = 2
    return bytes(data)


def by_torchvision(data: bytes) -> NDArray[np.uint8]:
    """A JPEG's pixels by another binding and another copy of libjpeg."""
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    decoded = torchvision.io.decode_image(tensor, mode=torchvision.io.ImageReadMode.RGB)
    return np.asarray(decoded.permute(1, 2, 0).numpy())


JPEG = encoded(PHOTO, quality=92)
CMYK = encoded(picture(INK, "CMYK"), quality=98, subsampling=0)
PNG = encoded(PHOTO, "PNG")
SIXTEEN = PHOTO.astype(np.uint16) * 256 + 37
INDEXED = picture(PHOTO).quantize(64)
PALETTE = np.array(INDEXED.getpalette(), np.uint8).reshape(-1, 3)
INDEX = np.asarray(INDEXED)
CLEAR = bytes([0] * 20 + [128] * 20 + [255] * 24)  # the alpha of each of the palette's colors
_VEIL = np.frombuffer(CLEAR, np.uint8)[INDEX][..., None] / 255
TURNED = Image.Exif()
TURNED[0x0112] = 6
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ"))
CORRUPT = bytearray(JPEG)
CORRUPT[len(JPEG) // 2 : len(JPEG) // 2 + 30] = bytes(range(30))

# What libjpeg decodes is what torchvision's own copy of it decodes.
JPEGS = {
    "plain": JPEG,
    "grayscale": encoded(picture(GRAY), quality=92),
    "progressive": encoded(PHOTO, quality=92, progressive=True),
    "full-chroma": encoded(PHOTO, quality=92, subsampling=0),
    "cmyk": CMYK,
    "ycck": ycck(),
    "trailing-garbage": JPEG + b"<html>" * 1000,
    "corrupt-middle": bytes(CORRUPT),
}

# What was put in is what must come out.
PIXELS: dict[str, tuple[bytes, NDArray[Any]]] = {
    **{f"jpeg-{name}": (data, by_torchvision(data)) for name, data in JPEGS.items()},
    "cmyk-by-formula": (CMYK, OF_INK),
    "ycck-by-formula": (ycck(), OF_INK),
    "exif-turned": (encoded(PHOTO, quality=95, exif=TURNED), PHOTO),
    "icc-profile": (encoded(PHOTO, quality=95, icc_profile=PROFILE.tobytes()), PHOTO),
    "png": (PNG, PHOTO),
    "bmp": (encoded(PHOTO, "BMP"), PHOTO),
    "tiff": (encoded(PHOTO, "TIFF"), PHOTO),
    "webp": (encoded(PHOTO, "WEBP", lossless=True), PHOTO),
    "gif": (encoded(INDEXED, "GIF"), PALETTE[INDEX]),
    "png-palette": (png(INDEX, 8, 3, PALETTE.tobytes()), PALETTE[INDEX]),
    "png-palette-alpha": (
        png(INDEX, 8, 3, PALETTE.tobytes(), CLEAR),
        PALETTE[INDEX] * _VEIL + 255 * (1 - _VEIL),
    ),
    "png-bilevel": (encoded(picture(GRAY).convert("1", dither=Image.Dither.NONE), "PNG"), (GRAY > 127) * 255.0),
    "png-gray": (png(GRAY, 8, 0), GRAY),
    "png-gray-16": (png(SIXTEEN[..., :1], 16, 0), GRAY),
    "tiff-gray-16": (encoded(Image.fromarray(SIXTEEN[..., 0]), "TIFF"), GRAY),
    "tiff-gray-16-big-endian": (encoded(picture(SIXTEEN[..., :1].astype(">u2"), "I;16B"), "TIFF"), GRAY),
    "png-rgb-16": (png(SIXTEEN, 16, 2), PHOTO),
    "png-gray-alpha": (png(np.dstack([GRAY, ALPHA]), 8, 4), GRAY * (ALPHA / 255) + 255 * (1 - ALPHA / 255)),
    "png-rgba": (png(np.dstack([PHOTO, ALPHA]), 8, 6), ON_WHITE),
    "png-rgba-16": (png(np.dstack([SIXTEEN, ALPHA.astype(np.uint16) * 257]), 16, 6), ON_WHITE),
    "png-gray-16-one-clear": (
        png(SIXTEEN[..., :1], 16, 0, transparent=struct.pack(">H", 256 * 130 + 37)),
        np.where(GRAY == 130, 255, GRAY),
    ),
    "webp-alpha": (encoded(picture(np.dstack([PHOTO, ALPHA])), "WEBP", lossless=True, exact=True), ON_WHITE),
    "multi-picture-jpeg": (frames("MPO", quality=95), PHOTO),
    "multi-page-tiff": (frames("TIFF"), PHOTO),
    "animated-webp": (frames("WEBP", lossless=True), PHOTO),
    "1x1": (png(np.full((1, 1, 3), (10, 200, 90)), 8, 2), np.full((1, 1, 3), (10, 200, 90))),
    "1x4000": (png(np.full((4000, 1, 3), (10, 200, 90)), 8, 2), np.full((4000, 1, 3), (10, 200, 90))),
    "4000x1": (png(np.full((1, 4000, 3), (10, 200, 90)), 8, 2), np.full((1, 4000, 3), (10, 200, 90))),
    **{f"tiff-turned-{turn}": (encoded(PHOTO, "TIFF", tiffinfo={274: turn}), PHOTO) for turn in range(1, 9)},
}


def stored(data: bytes) -> NDArray[np.float64]:
    with Image.open(io.BytesIO(convert(data, 95).jpeg)) as image:
        assert (image.mode, image.size) == ("RGB", (256, 256))
        return np.asarray(image, np.float64)


@pytest.mark.parametrize("kind", PIXELS)
def test_pixels_come_out_as_they_were_put_in(kind: str) -> None:
    data, pixels = PIXELS[kind]
    expected = central_square(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
    difference = np.abs(stored(data) - expected)
    # Wrong bits, palettes and bilevel images have hard edges of color, which the stored JPEG's halved chroma smears.
    assert difference.mean() < (5 if {"corrupt", "gif", "palette", "bilevel", "clear"} & set(kind.split("-")) else 1.5)
    # Another image, or this one turned, mirrored or inverted, would be far from it.
    assert difference.mean() < np.abs(stored(encoded(OTHER, "PNG")) - expected).mean() / 5


def claims(data: bytes, place: int, size: bytes) -> bytes:
    changed = bytearray(data)
    changed[place : place + len(size)] = size
    return bytes(changed)


def after(data: bytes, mark: bytes) -> int:
    return data.index(mark) + len(mark)


GIF, WEBP = encoded(INDEXED, "GIF"), encoded(PHOTO, "WEBP", lossless=True)
BIG = f"it claims more than {MAX_PIXELS} pixels"
BOMBS = {
    # Above our limit, below Pillow's and libjpeg's.
    "jpeg-9000": claims(JPEG, after(JPEG, b"\xff\xc0") + 3, struct.pack(">HH", 9000, 9000)),
    "png-9000": claims(PNG, 16, struct.pack(">II", 9000, 9000)),
    "gif-frame-65535": claims(GIF, GIF.index(b"\x2c\0\0\0\0") + 5, struct.pack("<HH", 65535, 65535)),
    "webp-16383": claims(WEBP, after(WEBP, b"VP8L") + 5, struct.pack("<I", 16382 | 16382 << 14)),
    # Ninety million black pixels' worth of a stream that is small.
    "png-bomb": png(np.zeros((9000, 1125), np.uint8), 8, 0).replace(
        struct.pack(">II", 1125, 9000), struct.pack(">II", 10000, 9000), 1
    ),
}
# The header's checksum must fit, or it would be refused for that.
for _name in ("png-9000", "png-bomb"):
    BOMBS[_name] = claims(BOMBS[_name], 29, struct.pack(">I", zlib.crc32(BOMBS[_name][12:29])))
TEXT_BOMB = (
    PNG[:33]
    + struct.pack(">I", (len(_text := b"Comment\0\0" + zlib.compress(bytes(64 * 2**20), 9))))
    + (b"zTXt" + _text + struct.pack(">I", zlib.crc32(b"zTXt" + _text)) + PNG[33:])
)

SET_ASIDE = {
    "empty": (b"", "the file is empty"),
    "html": (b"<html>404 Not Found</html>", "it is no image in a known format"),
    "postscript": (encoded(picture(PHOTO), "EPS"), "it is no image in a known format"),
    "jpeg-start": (JPEG[:2], "it is no image in a known format"),
    "jpeg-header-only": (JPEG[: after(JPEG, b"\xff\xda") + 10], "it does not decode: Truncated File Read"),
    "jpeg-half": (JPEG[: len(JPEG) // 2], "it does not decode: image file is truncated"),
    "jpeg-without-end": (JPEG[:-2], "it does not decode: image file is truncated"),
    "png-half": (PNG[: len(PNG) // 2], "it does not decode: image file is truncated"),
    "png-wrong-bit": (claims(PNG, len(PNG) // 2, bytes([PNG[len(PNG) // 2] ^ 1])), "it does not decode: broken data"),
    "webp-half": (WEBP[: len(WEBP) // 2], "it does not decode: could not create decoder object"),
    "float-tiff": (encoded(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"), "its pixels are 32-bit numbers"),
    "text-bomb": (TEXT_BOMB, "it does not decode: Decompressed data too large"),
    **{name: (data, BIG) for name, data in BOMBS.items()},
}


@pytest.mark.parametrize("kind", [*BOMBS, "text-bomb"])
def test_a_header_alone_takes_no_memory(kind: str) -> None:
    """An image of 65535 x 65535 has 12 GiB."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + 64 * 2**20, hard))
    try:
        with pytest.raises(ImageError, match=SET_ASIDE[kind][1]):
            convert(SET_ASIDE[kind][0], 90)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_a_folder_of_odd_images_becomes_a_set_and_says_what_it_left_out(tmp_path: Path) -> None:
    """All of them under the name .JPEG, in one shard, with links that lead nowhere."""
    good = {name: data for name, (data, _) in PIXELS.items()}
    bad = {name: data for name, (data, _) in SET_ASIDE.items()}
    reasons = {name: reason for name, (_, reason) in SET_ASIDE.items()}
    if os.geteuid() != 0:  # Root reads everything.
        bad["locked"], reasons["locked"] = JPEG, "it cannot be read: Permission denied"
    files = {f"train/n0/n0_{name}": data for name, data in {**good, **bad}.items()}
    files |= {"train/n1/n1_plain": JPEG, "val/n0/n0_val": JPEG, "val/n1/n1_val": JPEG}
    for name, data in files.items():
        path = tmp_path / "images" / f"{name}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0 if name.endswith("locked") else 0o644)
    folder = tmp_path / "images" / "train" / "n0"
    (folder / "n0_broken-link.JPEG").symlink_to(tmp_path / "nowhere")
    (folder / "n0_loop.JPEG").symlink_to(folder / "n0_loop.JPEG")
    reasons["broken-link"] = "it cannot be read: No such file or directory"
    reasons["loop"] = "it cannot be read: Too many levels of symbolic links"

    output = make(tmp_path / "out", planned(tmp_path / "images", per_shard=1000))
    info = read_dataset(output)
    reader = SplitReader(output, info, "train")
    assert {reader.key(i) for i in range(len(reader))} == {"n1_plain", *(f"n0_{name}" for name in good)}
    lines = [json.loads(line) for line in (output / "rejects.jsonl").read_text().splitlines()]
    said = {Path(line["path"]).stem.removeprefix("n0_"): line["reason"] for line in lines}
    assert {name: reason[: len(reasons.get(name, ""))] for name, reason in said.items()} == reasons
    assert not any("\n" in reason for reason in said.values())
    assert {(Path(line["path"]).parent, line["class"]) for line in lines} == {(folder, "n0")}
    assert info.set_aside == len(reasons)
