"""Reading from URLs: a file's size, a folder's contents, and ranges of bytes, each tried again where a network fails.

Everything here raises OSError alone: FileNotFoundError for what is not there, PermissionError for what may not be read,
NoRangesError for a server that cannot be read in place, and any other for a network that still fails.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import aiohttp
from pyarrow import fs

from pipeline.storage.locations import NoRangesError, is_http, open_location, shown

ATTEMPTS = 4
FIRST_WAIT_S = 0.2  # Doubled with each further attempt.
# Reading on costs less than a new request, up to some distance: what lies nearer than this is read through.
NEAR = 2 * 2**20
PEEK = 32 * 2**10
OPEN_FILES = 512  # Kept open by a process: opening asks for the size, which costs a request.

Result = TypeVar("Result")


class Item(NamedTuple):
    """Something in a folder."""

    name: str
    folder: bool
    size: int | None
    """In bytes; None for what is neither a folder nor a regular file."""


def kind(url: str) -> fs.FileType:
    """Whether a URL is a file, a folder or not there; by HTTP, which has no folders, a file.

    Raises:
        OSError: see above.
        ValueError: for a URL that cannot be opened.
    """
    filesystem, path = open_location(url)
    if is_http(url):
        return fs.FileType.File
    return _try(url, lambda: filesystem.get_file_info(path).type)


def size(url: str) -> int:
    """Of a file, in bytes."""

    def ask() -> int:
        with _opened(url) as file:
            return int(file.size())

    return _try(url, ask)


def scan(url: str) -> list[Item]:
    """What a folder holds; for S3 one request a thousand names, for Google's store a thousand of all that is below."""
    filesystem, path = open_location(url)
    # There a folder that nobody made an object for is not listed, only what is in it.
    below = filesystem.type_name == "gcs"
    infos = _try(url, lambda: filesystem.get_file_info(fs.FileSelector(path, recursive=below)))
    found: dict[str, Item] = {}
    for info in infos:
        name, deeper, _ = info.path.removeprefix(f"{path}/").partition("/")
        if deeper or info.type == fs.FileType.Directory:
            found[name] = Item(name, True, None)
        else:
            found[name] = Item(name, False, info.size if info.type == fs.FileType.File else None)
    return list(found.values())


def read(url: str) -> bytes:
    """The whole of a file."""

    def ask() -> bytes:
        with _open(url) as file:
            data: bytes = file.read()
            return data

    return _try(url, ask)


def read_range(url: str, offset: int, length: int) -> bytes:
    """`length` bytes of a file from `offset` on; fewer where it ends before."""

    def ask() -> bytes:
        with _opened(url) as file:
            try:
                data: bytes = file.read_at(length, offset)
            # What fsspec says of a server that answers a range with the whole file.
            except ValueError as error:
                raise NoRangesError(f"{shown(url)} cannot be read in place: {error}") from error
            return data

    return _try(url, ask)


class ReadAhead:
    """A stretch of a file for someone who goes through it in order, jumping: small reads make few requests.

    After a jump it reads PEEK bytes, and NEAR bytes once the next read turns out to be near.
    """

    def __init__(self, url: str, end: int) -> None:
        """Args: end: where the stretch ends in the file."""
        self._url = url
        self._end = end
        self._start = 0
        self._data = b""

    def read_at(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` of the file on; fewer where it ends before."""
        inside = offset - self._start
        if not 0 <= inside <= inside + length <= len(self._data):
            near = bool(self._data) and 0 <= inside < len(self._data) + NEAR
            # The old bytes go before the new ones come: many of these may be at work.
            self._data = b""
            wanted = max(length, NEAR if near else PEEK)
            self._data = read_range(self._url, offset, max(0, min(wanted, self._end - offset)))
            self._start, inside = offset, 0
        return self._data[inside : inside + length]

    def close(self) -> None:
        """Forgets what was read."""
        self._data = b""


_free: dict[str, list[Any]] = {}
_lock = threading.Lock()


@contextlib.contextmanager
def _opened(url: str) -> Iterator[Any]:
    """A file open for reading, for one thread at a time; kept for the next one where it did not fail."""
    with _lock:
        free = _free.get(url)
        file = free.pop() if free else None
    if file is None:
        file = _open(url)
    yield file
    with _lock:
        if sum(map(len, _free.values())) < OPEN_FILES:
            _free.setdefault(url, []).append(file)


def _open(url: str) -> Any:
    try:
        filesystem, path = open_location(url)
    # Finding a bucket's region may fail as any request may.
    except ValueError as error:
        raise ConnectionError(str(error)) from error
    return filesystem.open_input_file(path)


def _try(url: str, ask: Callable[[], Result]) -> Result:
    wait = FIRST_WAIT_S
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return ask()
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), shown(url)) from error
        except PermissionError as error:
            raise PermissionError(errno.EACCES, " ".join(str(error).split()), shown(url)) from error
        except NoRangesError:
            raise
        # aiohttp's errors are no OSErrors.
        except (OSError, aiohttp.ClientError) as error:
            if attempt == ATTEMPTS:
                text = " ".join(str(error).split()) or type(error).__name__
                raise OSError(errno.EIO, f"{text} (tried {ATTEMPTS} times)", shown(url)) from error
            time.sleep(wait)
            wait *= 2
    raise AssertionError("the last attempt returns or raises")
