"""What every kind of source is made of: files, or stretches of tars that are read in place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

IMAGE_EXTENSIONS = frozenset({".jpeg", ".jpg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"})
LISTING_THREADS = 16  # A network disk answers many at once; a local one does not mind.
UNREADABLE = -1


class SourceError(ValueError):
    """A source that is missing, empty, or not laid out as a data set."""


class File(NamedTuple):
    """One image file, or one member of a tar."""

    path: str
    """Absolute: of the file, or of the tar that holds it."""
    size: int
    """In bytes; UNREADABLE for a file that cannot be reached."""
    offset: int | None = None
    """Where its bytes begin in the tar; None for a file of its own."""
    member: str = ""
    """Its name in the tar, with the names of tars in between."""

    @property
    def name(self) -> str:
        return os.path.basename(self.member or self.path)


Classes = dict[str, list[File]]
"""The images of each class, in the order of their names."""


def is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def read_bytes(path: str, offset: int | None, size: int) -> bytes:
    """A whole file, or `size` bytes of one from `offset` on; fewer where it ends before.

    Raises:
        OSError: if it cannot be read.
    """
    if offset is None:
        return Path(path).read_bytes()
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        # A network disk may hand out less than it was asked for.
        parts, missing = [], size
        while missing and (part := file.read(missing)):
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)
