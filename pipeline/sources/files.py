"""What every kind of source is made of: files, or stretches of tars that are read in place."""

from __future__ import annotations

import functools
import io
import os
import resource
from pathlib import Path
from typing import NamedTuple

from pipeline.storage import remote
from pipeline.storage.locations import is_url

NAMED = 4  # So many names stand in a message.
IMAGE_EXTENSIONS = frozenset({".jpeg", ".jpg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"})
LISTING_THREADS = 16  # A network disk answers many at once; a local one does not mind.
URL_THREADS = 64  # Each waits for a header, whose answer takes some 20 ms.
UNREADABLE = -1


class SourceError(ValueError):
    """A source that is missing, empty, or not laid out as a data set."""


class File(NamedTuple):
    """One image file, or one member of a tar."""

    path: str
    """Absolute path or URL: of the file, or of the tar that holds it."""
    size: int
    """In bytes; UNREADABLE for a file that cannot be reached."""
    offset: int | None = None
    """Where its bytes begin in the tar; None for a file of its own."""
    member: str = ""
    """Its name in the tar, with the names of tars in between."""


class FileState(NamedTuple):
    """By what another file in a file's place is told, or a change to it, without reading it."""

    size: int
    """In bytes."""
    mtime_ns: int


def state_of(path: str) -> FileState:
    """The state of a file on a disk.

    Raises:
        OSError: if it is not there.
    """
    status = os.stat(path)
    return FileState(status.st_size, status.st_mtime_ns)


def is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def read_bytes(path: str, offset: int | None, size: int) -> bytes:
    """A whole file, or `size` bytes of one from `offset` on; fewer where it ends before.

    Args:
        path: a local path or a URL.

    Raises:
        OSError: if it cannot be read.
    """
    if is_url(path):
        return remote.read(path) if offset is None else remote.read_range(path, offset, size)
    if offset is None:
        return Path(path).read_bytes()
    # A tar is opened once for many images. Another file in its place is another file.
    status = os.stat(path)
    return _opened(path, status.st_ino, status.st_size, status.st_mtime_ns).read_at(offset, size)


class LocalRanges(io.FileIO):
    """A file on a disk, read at any place, by many threads at a time; closed when nobody has it any more."""

    def read_at(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on; fewer where it ends before."""
        parts, missing = [], length
        # A network disk may hand out less than it was asked for.
        while missing > 0 and (part := os.pread(self.fileno(), missing, offset + length - missing)):
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def __del__(self) -> None:
        self.close()


@functools.lru_cache(min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2))
def _opened(path: str, *state: int) -> LocalRanges:
    return LocalRanges(path)
