"""One shard's file, read so that whatever befalls it while it is open is an error, and neither a crash nor wrong bytes.

Not a memory map: where a mapped file is cut or its disk fails, the process dies of SIGBUS without a word. Reading costs
4 microseconds an image more than a view of a map, and takes just the image from a cold disk, not what lies around it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import weakref
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.annotation import ShardError, read_annotation

SPARE_FILES = 256  # Beside the shards: sockets of Ray's and of the other workers, logs, one shard's index.


class ChangedError(ValueError):
    """A file that was cut or written to since it was opened; the message is a clause about it."""


class DamagedError(ValueError):
    """Bytes that cannot be read or are not those that were written; the message is a clause about them."""


class ShardFile:
    """A file that stays open while this object lives; one replaced by another of its name is read as it was.

    Raises:
        OSError: if it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        status = os.fstat(self._descriptor)
        self.size = status.st_size
        self._written_ns = status.st_mtime_ns

    def read(self, offset: int, size: int, crc32: int | None = None) -> bytes:
        """Some of its bytes, checked.

        Args:
            crc32: theirs; where none is known, the file must be as it was when it was opened.

        Raises:
            ChangedError: if the file was cut or written to, and these bytes are not vouched for.
            DamagedError: if they cannot be read or are not those of the checksum, for no reason that can be seen.
        """
        data = self._read(offset, size)
        if crc32 is None or zlib.crc32(data) != crc32:
            self._refuse_change()
            if crc32 is not None:
                raise DamagedError("is not what was written: its bytes have another CRC-32 than its annotation says")
        return data

    def read_each(self, places: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """Small parts of it, each as `read` gives it without a checksum; far apart, they come from a disk together.

        Args:
            places: offset and size of each.

        Raises:
            ChangedError, DamagedError: as `read`; that the file is as it was is known when the last has been given.
        """
        # A label's page takes a disk 0.1 ms, which a thousand asked for at once do not wait for one after the other.
        with contextlib.suppress(OSError):  # Of a file system that takes no advice.
            for offset, size in places:
                os.posix_fadvise(self._descriptor, offset, size, os.POSIX_FADV_WILLNEED)
        for offset, size in places:
            yield self._read(offset, size)
        self._refuse_change()

    def _read(self, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self._descriptor, size, offset)
            # Short before the end of the file only where the disk failed on the way: asking for the rest says so.
            while len(data) < size and (more := os.pread(self._descriptor, size - len(data), offset + len(data))):
                data += more
        except OSError as error:
            raise DamagedError(f"cannot be read: {error}") from error
        if len(data) < size:
            self._refuse_change()
            raise DamagedError(f"ends after {len(data)} of {size} bytes")
        return data

    def _refuse_change(self) -> None:
        status = os.fstat(self._descriptor)
        if status.st_size != self.size:
            raise ChangedError(f"had {self.size} bytes when it was opened and has {status.st_size} now")
        if status.st_mtime_ns != self._written_ns:
            raise ChangedError("was written to after it was opened")


def allow_open_files(more: int) -> None:
    """Lets this process keep so many more files open.

    A thousand shards are more than the 1,024 that shells allow; as a rule a process may allow itself more.

    Raises:
        OSError: if the system does not let it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = len(os.listdir("/proc/self/fd")) + more
    if need + SPARE_FILES <= soft:
        return
    if need > hard != resource.RLIM_INFINITY:
        raise OSError(
            errno.EMFILE, f"a process may have {hard} files open, and {need} are needed: allow more by ulimit -Hn"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def read_checksums(annotation: Path, sha256: str, samples: int) -> NDArray[np.uint32] | None:
    """Each sample's CRC-32 by a shard's annotation, uint32 [samples]; None where it has none or there is no annotation.

    Args:
        annotation: the shard's NAME.json.
        sha256: of the tar that it must be about.
        samples: how many the shard holds.

    Raises:
        ShardError: if it cannot be understood or is about another tar.
        OSError: if it is there and cannot be read.
    """
    try:
        found = read_annotation(annotation)
    except FileNotFoundError:
        return None
    if found.sha256 != sha256 or len(found.crc32) not in (0, samples):
        raise ShardError(f"{annotation} is about another shard than dataset.json")
    return np.array(found.crc32, np.uint32) if found.crc32 else None
