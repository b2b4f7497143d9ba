"""Images inside tars, found by their headers and read where they lie: nothing is unpacked.

ImageNet's training images come as one tar of 1000 class tars, its validation images as one flat tar.
"""

from __future__ import annotations

import io
import os
import posixpath
import shlex
import tarfile
from collections.abc import Generator
from typing import Any, NamedTuple

from pipeline.sources.file_table import FileTable, Holder
from pipeline.sources.files import FileState, LocalRanges, SourceError, state_of
from pipeline.storage import remote
from pipeline.storage.locations import is_url, shown

BLOCK = 512  # Bytes
_ARCHIVES = (
    (b"\x1f\x8b", "gzip", "gunzip --keep"),
    (b"BZh", "bzip2", "bunzip2 --keep"),
    (b"\xfd7zXZ", "xz", "unxz --keep"),
    (b"\x28\xb5\x2f\xfd", "Zstandard", "unzstd"),
    (b"PK", "zip", "unzip"),
    (b"7z\xbc\xaf", "7-Zip", "7z x"),
    (b"Rar!", "RAR", "unrar x"),
)


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    """With its folders, without "./" and double slashes."""
    offset: int
    """Of its first byte, in the outermost file."""
    size: int

    @property
    def base(self) -> str:
        return os.path.basename(self.name)

    @property
    def hidden(self) -> bool:
        """Whether its name, or that of a folder it lies in, begins with a dot."""
        return self.name.startswith(".") or "/." in self.name


class Stretch(NamedTuple):
    """Bytes of a file that are a tar: all of it, or a member of another tar."""

    path: str
    """A local path or a URL."""
    start: int
    size: int
    inside: str = ""
    """Its name in the outer tar."""
    state: FileState | None = None
    """Of the file on a disk, when it was opened; None for a URL, where each look would cost a request."""

    @property
    def where(self) -> str:
        return f"{shown(self.path)}/{self.inside}" if self.inside else shown(self.path)


def whole(path: str | os.PathLike[str]) -> Stretch:
    """A tar file as it is, at a local path or URL.

    Raises:
        OSError: if it is not there or cannot be read.
    """
    location = os.fspath(path)
    if is_url(location):
        return Stretch(location, 0, remote.size(location))
    state = state_of(location)
    return Stretch(location, 0, state.size, state=state)


def members_in(file: Window) -> Generator[Member]:
    """The regular files of a tar, in its order, each header read and no contents.

    Raises:
        SourceError: if it is compressed, cut off or damaged, or holds a member that is neither a file nor a folder, or
            one whose name leads out of the tar.
        OSError: if it cannot be read.
    """
    tar = file.tar
    last = ""
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for header in archive:
                last = header.name
                member = _member(tar, header)
                if member is not None:
                    yield member
                # tarfile would keep every header it has seen.
                archive.members.clear()  # type: ignore[attr-defined]
            end = archive.offset
    except SourceError:
        raise
    # A damaged extended header ends in a ValueError of tarfile's.
    except (tarfile.TarError, ValueError) as error:
        if last:
            cure = f"it is cut off or damaged after its member {last!r}, download or copy it again"
        else:
            file.seek(0)
            cure = _instead_of_a_tar(tar, file.read(8))
        raise SourceError(f"{tar.where} is no whole tar ({error}): {cure}") from error
    # tarfile takes a damaged header for the end, and what follows would be lost without a word.
    file.seek(end)
    rest = file.read(tarfile.RECORDSIZE + BLOCK)
    if rest[:BLOCK] != bytes(BLOCK):
        raise SourceError(
            f"{tar.where} is cut off or damaged after its member {last!r}, at byte {end}: download or copy it again"
        )
    if rest.strip(b"\0"):
        raise SourceError(
            f"{tar.where} holds something behind the tar's end, at byte {end}, as after `cat a.tar b.tar`: "
            "keep such tars apart"
        )


def _instead_of_a_tar(tar: Stretch, beginning: bytes) -> str:
    """What a file is that is no tar, by its first bytes, and what to do about it."""
    if beginning.lstrip().startswith(b"<"):
        return "it is a web page, download it again with the login that it asks for"
    for magic, kind, command in _ARCHIVES:
        if beginning.startswith(magic):
            alone = "" if tar.inside or is_url(tar.path) else f", as by `{command} {shlex.quote(tar.path)}`"
            return f"it is compressed ({kind}), give what it holds{alone}"
    return "it is empty, download or copy it again" if not beginning else "give a tar"


def table_of(tar: Stretch, found: list[Member]) -> FileTable:
    """Some members of a tar as a table."""
    holder = Holder(tar.path, f"{tar.inside}/" if tar.inside else "", tar.state)
    names, offsets, sizes = zip(*found, strict=True) if found else ((), (), ())
    return FileTable.of(holder, names, sizes, offsets)


def fault_of(header: tarfile.TarInfo) -> str | None:
    """What is wrong with a tar that holds this member, as a clause about the tar; None for a file or a folder.

    A negative size, a sparse file's too, would lead tarfile back to what it has read.
    """
    name = header.name
    if name.startswith("/") or ".." in name.split("/"):
        return f"holds {name!r}, a name that leads out of it: make it again without"
    if header.size < 0:
        return f"is damaged: its member {name!r} has {header.size} bytes, download it again"
    if header.isdir() or (header.isreg() and not header.issparse()):
        return None
    kind = "link" if header.islnk() or header.issym() else "sparse file" if header.issparse() else "special file"
    return (
        f"holds the {kind} {name!r}, which cannot be read in place: "
        "make it again with tar --dereference --hard-dereference and without --sparse"
    )


def _member(tar: Stretch, header: tarfile.TarInfo) -> Member | None:
    """A header's file; None for a folder."""
    if fault := fault_of(header):
        raise SourceError(f"{tar.where} {fault}")
    if header.isdir():
        return None
    return Member(posixpath.normpath(header.name), tar.start + header.offset_data, header.size)


class Window(io.RawIOBase):
    """A stretch of a file as a file of its own, which is all that tarfile needs."""

    def __init__(self, tar: Stretch) -> None:
        self.tar = tar
        self._position = 0
        url = is_url(tar.path)
        self._file = remote.ReadAhead(tar.path, tar.start + tar.size) if url else LocalRanges(tar.path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.tar.size}[whence]
        self._position = origin + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        # A damaged header may ask for more than there is memory for.
        left = max(0, self.tar.size - self._position)
        return super().read(left if size < 0 else min(size, left)) or b""

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self.tar.size - self._position))
        data = self._file.read_at(self.tar.start + self._position, length)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def contents(self, member: Member) -> bytes:
        """The bytes of a member, fewer where the file ends; the position stays."""
        return self._file.read_at(member.offset, member.size)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
