"""One shard's file: reading raises if it is truncated or modified while it is open, or its bytes are not those written.

Not a memory map: where a mapped file is cut or its disk fails, the process dies of SIGBUS without a word.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import weakref
import zlib

SPARE_FILES = 256  # Beside the shards: sockets of Ray's and of the other workers, logs.


class DamagedError(ValueError):
    """Bytes that cannot be read or are not those that were written; the message is a clause about them."""


class ShardFile:
    """A file that stays open while this object lives; one replaced by another of its name is read as it was.

    Pickled, it is good in a process that inherits `descriptor`.

    Raises:
        OSError: if it cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.descriptor)
        self.size = os.fstat(self.descriptor).st_size

    def read_into(self, room: memoryview, offset: int, crc32: int | None) -> None:
        """Fills `room` with the bytes at an offset, and checks them.

        Args:
            room: as many bytes as are wanted, writable.
            crc32: theirs; None where nothing vouches for them.

        Raises:
            DamagedError: if they cannot be read or are not those of the checksum.
        """
        try:
            read = os.preadv(self.descriptor, (room,), offset)
            # Short before the end of the file only where the disk failed on the way: asking for the rest says so.
            while read < len(room) and (more := os.preadv(self.descriptor, (room[read:],), offset + read)):
                read += more
        except (OSError, OverflowError) as error:
            raise DamagedError(f"cannot be read: {error}") from error
        if read < len(room):
            raise DamagedError(f"ends after {read} of {len(room)} bytes")
        if crc32 is not None and zlib.crc32(room) != crc32:
            raise DamagedError("is not what was written: its bytes have another CRC-32 than the sample index says")


def allow_open_files(more: int) -> None:
    """Lets this process keep so many more files open.

    A thousand shards are more than the 1,024 that shells allow; as a rule a process may allow itself more.

    Raises:
        OSError: if the system does not let it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = len(os.listdir("/proc/self/fd")) + more
    if need > hard != resource.RLIM_INFINITY:
        raise OSError(
            errno.EMFILE, f"a process may have {hard} files open, and {need} are needed: allow more by ulimit -Hn"
        )
    if need + SPARE_FILES > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # The kernel's table of open files then grows once, and not by doubling, each time for milliseconds.
    with open(os.devnull) as file:
        os.close(fcntl.fcntl(file.fileno(), fcntl.F_DUPFD_CLOEXEC, need))
