"""Files at a path or URL: read whole, in chunks or by ranges, written, listed and deleted.

What fails at a URL is tried again (`pipeline.storage.retry`). OSError is raised for what cannot be done:
FileNotFoundError for what is not there, PermissionError for what may not be read, NoRangesError for a server that
cannot be read in place, SourceReadError for a network that still fails, and on a disk whatever the system says.
ValueError is raised for a URL that nobody can open.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import aiohttp
from pyarrow import fs

from pipeline.storage.locations import Location, NoRangesError, http_reason, is_http, is_url, open_location, shown
from pipeline.storage.retry import SourceReadError, retry

NEAR = 2 * 2**20  # A connection brings this in the time of a request, or some times as much.
PEEK = 4 * 2**10  # Holds a few headers and labels.
OPEN_FILES = 4096  # Kept open by a process: opening asks for the size, which costs a request.

CHUNK = 8 * 2**20  # Bytes
TEMPORARY_SUFFIX = ".tmp"  # Of files being written aside; no reader looks at them.

Result = TypeVar("Result")


class Item(NamedTuple):
    """Something in a folder."""

    name: str
    folder: bool
    size: int | None
    """In bytes; None for what is neither a folder nor a regular file."""
    mtime_ns: int = 0
    """When it was last written; 0 where nobody knows."""


def kind(location: Location) -> fs.FileType:
    """Whether something is a file, a folder or not there; by HTTP, which has no folders, a file.

    Raises:
        OSError: see above.
        ValueError: for a URL that cannot be opened.
    """
    filesystem, path = open_location(location)
    if is_http(location):
        return fs.FileType.File
    return _try(location, lambda: filesystem.get_file_info(path).type)


def size(url: str) -> int:
    """Of a file, in bytes."""

    def ask() -> int:
        with _opened(url) as file:
            return int(file.size())

    return _try(url, ask)


def version(url: str) -> str:
    """What changes when a file is written anew; empty where a web server does not tell."""
    filesystem, path = open_location(url)
    if not is_http(url):
        found = _try(url, lambda: filesystem.get_file_info(path))
        # A store's clock may count seconds.
        return f"{found.size} {found.mtime_ns}"
    # It tells apart why there is none, as the library below does not.
    bytes_ = size(url)
    info = _try(url, lambda: filesystem.handler.fs.info(path))
    return f"{bytes_} {tag}" if (tag := info.get("ETag") or info.get("Last-Modified")) else ""


def scan(folder: Location, missing_ok: bool = False) -> list[Item]:
    """What a folder holds; for S3 one request a thousand names, for Google's store a thousand of all that is below."""
    filesystem, path = open_location(folder)
    # There a folder that nobody made an object for is not listed, only what is in it.
    below = filesystem.type_name == "gcs"
    selector = fs.FileSelector(path, recursive=below, allow_not_found=missing_ok)
    found: dict[str, Item] = {}
    for info in _try(folder, lambda: filesystem.get_file_info(selector)):
        name, deeper, _ = info.path.removeprefix(f"{path}/").partition("/")
        if deeper or info.type == fs.FileType.Directory:
            found[name] = Item(name, True, None)
        else:
            found[name] = Item(name, False, info.size if info.type == fs.FileType.File else None, info.mtime_ns or 0)
    return list(found.values())


def read(location: Location) -> bytes:
    """The whole of a file."""
    if not is_url(location):
        return Path(location).read_bytes()

    def ask() -> bytes:
        with _open(location) as file:
            data: bytes = file.read()
            return data

    return _try(location, ask)


def chunks(location: Location) -> Iterator[bytes]:
    """A file's bytes, CHUNK at a time, in one attempt: whoever asks again must begin again.

    Raises:
        SourceReadError: if it cannot be read to its end, on a disk, too.
        FileNotFoundError, PermissionError, NoRangesError: see above.
    """
    with reading(location), _open(location, stream=True) as stream:
        while chunk := stream.read(CHUNK):
            yield chunk


def write(location: Location, data: bytes | memoryview) -> None:
    """Writes a whole file, so that on a disk no reader meets half of it.

    In a store a reader may: pyarrow cannot abort an upload, so of one that fails the parts already sent may become a
    file. Write last, and to a file of its own, what vouches for the others.
    """
    if not is_url(location):
        return write_atomically(Path(location), data)

    def put() -> None:
        filesystem, path = open_location(location)
        with filesystem.open_output_stream(path, compression=None) as stream:
            stream.write(data)

    return _try(location, put, "written")


def delete(location: Location) -> None:
    """Deletes a file, if it is there."""
    filesystem, path = open_location(location)
    with contextlib.suppress(FileNotFoundError):
        _try(location, lambda: filesystem.delete_file(path), "deleted")


def empty(folder: Location) -> None:
    """Makes a folder, and deletes what is in it if it is there."""
    filesystem, path = open_location(folder)
    _try(folder, lambda: filesystem.delete_dir_contents(path, missing_dir_ok=True), "emptied")
    _try(folder, lambda: filesystem.create_dir(path), "made")


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Writes a file aside, flushes it to the disk and renames it: a reader or a kill never meets half a file."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    # The rename itself is only durable once its folder is on the disk too.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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
    """A stretch of a file for someone who goes through it in order, jumping, as from header to header of a tar.

    Each read costs a request. One that goes through a file alone waits for each, some 20 ms, in which it reads NEAR
    bytes: so it reads on over what is nearer. Where many go through a file each, they wait at the same time and share
    the network, and what is near is nearer by as much. Then a read fetches PEEK bytes.
    """

    _at_work: ClassVar[set[int]] = set()

    def __init__(self, url: str, end: int) -> None:
        """Args: end: where the stretch ends in the file."""
        self._url = url
        self._end = end
        self._start = 0
        self._data = b""
        self._last: int | None = None
        self._step = NEAR
        """How far apart its peeks would be, in the mean of the last ones, in bytes."""
        self._at_work.add(id(self))

    def read_at(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` of the file on; fewer where it ends before."""
        if self._last is None:
            self._last = offset
        elif (step := offset - self._last) >= PEEK:
            self._step += (step - self._step) // 4
            self._last = offset
        inside = offset - self._start
        if not 0 <= inside <= inside + length <= len(self._data):
            # The old bytes go before the new ones come: many of these may be at work.
            self._data = b""
            wanted = max(length, NEAR if self._step * len(self._at_work) < NEAR else PEEK)
            self._data = read_range(self._url, offset, max(0, min(wanted, self._end - offset)))
            self._start, inside = offset, 0
        return self._data[inside : inside + length]

    def close(self) -> None:
        """Forgets what was read."""
        self._data = b""
        self._at_work.discard(id(self))


_free: collections.OrderedDict[str, list[Any]] = collections.OrderedDict()
"""Open files that nobody reads from, by URL, those last used at the end."""
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
        _free.setdefault(url, []).append(file)
        _free.move_to_end(url)
        if len(_free) > OPEN_FILES:
            _free.popitem(last=False)


def _open(location: Location, stream: bool = False) -> Any:
    try:
        filesystem, path = open_location(location)
    except ValueError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        # Finding a bucket's region may fail as any request may.
        raise ConnectionError(str(error)) from error
    return filesystem.open_input_stream(path, compression=None) if stream else filesystem.open_input_file(path)


@contextlib.contextmanager
def reading(location: Location) -> Iterator[None]:
    """Makes any failure within it that another attempt may mend a SourceReadError."""
    try:
        yield
    except (SourceReadError, NoRangesError):
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), shown(location)) from error
    except PermissionError as error:
        raise PermissionError(errno.EACCES, " ".join(str(error).split()), shown(location)) from error
    # Not all of aiohttp's errors are OSErrors.
    except aiohttp.ClientError as error:
        raise SourceReadError(http_reason(error)) from error
    except OSError as error:
        raise SourceReadError(" ".join(str(error).split()) or type(error).__name__) from error


def _try(location: Location, ask: Callable[[], Result], did: str = "read") -> Result:
    """What `ask` returns: of a URL in several attempts, on a disk in one."""
    if not is_url(location):
        return ask()

    def attempt() -> Result:
        with reading(location):
            return ask()

    return retry(attempt, shown(location), did)
