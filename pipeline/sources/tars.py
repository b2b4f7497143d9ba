"""Images inside tars, found by their headers and read where they lie: nothing is unpacked.

ImageNet's training images come as one tar of 1000 class tars, its validation images as one flat tar.
"""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from pipeline.sources.file_table import Classes, FileTable, Holder
from pipeline.sources.files import (
    IMAGE_EXTENSIONS,
    LISTING_THREADS,
    FileState,
    LocalRanges,
    SourceError,
    is_image_name,
    state_of,
)
from pipeline.storage import remote
from pipeline.storage.locations import is_url, shown

BLOCK = 512  # Bytes


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    """With its folders, without a leading "./"."""
    offset: int
    """Of its first byte, in the outermost file."""
    size: int

    @property
    def base(self) -> str:
        return os.path.basename(self.name)

    @property
    def hidden(self) -> bool:
        return self.base.startswith(".")


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


def members(tar: Stretch) -> Generator[Member]:
    """The regular files of a tar, in its order, each header read and no contents.

    Raises:
        SourceError: if it is compressed, cut off or damaged, or holds a member that is neither a file nor a folder, or
            one whose name leads out of the tar.
        OSError: if it cannot be read.
    """
    with contextlib.closing(Window(tar)) as file:
        yield from members_in(file)


def members_in(file: Window) -> Generator[Member]:
    """As `members`, for one who reads contents on the way, too."""
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
        cure = (
            f"it is cut off or damaged after its member {last!r}, download or copy it again"
            if last
            else "give a tar that is not compressed"
        )
        raise SourceError(f"{tar.where} is no whole tar ({error}): {cure}") from error
    # tarfile takes a damaged header for the end, and what follows would be lost without a word.
    file.seek(end)
    if file.read(BLOCK) != bytes(BLOCK):
        raise SourceError(
            f"{tar.where} is cut off or damaged after its member {last!r}, at byte {end}: download or copy it again"
        )


def read_tar_of_tars(path: str, flag: str) -> tuple[Classes, int]:
    """The images of a tar of class tars by class, sorted by name, and how many other files there are.

    Raises:
        SourceError, OSError: see `members`; also for a class or an image that is there twice.
    """
    tars: dict[str, Stretch] = {}
    ignored = 0
    outer = whole(path)
    for member in members(outer):
        wnid, extension = os.path.splitext(member.base)
        if member.hidden:
            continue
        if extension.lower() != ".tar":
            ignored += 1
            continue
        if wnid in tars:
            raise SourceError(
                f"{shown(path)} holds the class tar {member.base} twice: make it again with one tar a class"
            )
        tars[wnid] = Stretch(path, member.offset, member.size, member.name, outer.state)
    if not tars:
        raise SourceError(
            f"{shown(path)} holds {ignored or 'no'} files and no class tars: give {flag} a tar of one tar a class"
        )
    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        return _by_class(tars, list(pool.map(_read_images, tars.values())), ignored)


def read_class_tars(tars: Mapping[str, str]) -> tuple[Classes, int]:
    """The images of class tars that are files of their own, by class, sorted by name, and how many other files.

    Args:
        tars: the location of each, by its name.

    Raises:
        SourceError, OSError: see `members`; also for an image that is there twice.
    """
    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        stretches = list(pool.map(whole, tars.values()))
        listed = list(pool.map(_read_images, stretches))
    return _by_class({os.path.splitext(name)[0]: tar for name, tar in zip(tars, stretches, strict=True)}, listed, 0)


def _by_class(tars: Mapping[str, Stretch], listed: list[tuple[FileTable, int]], ignored: int) -> tuple[Classes, int]:
    classes = {}
    for (wnid, tar), (files, others) in zip(tars.items(), listed, strict=True):
        if not len(files):
            raise SourceError(
                f"the class tar {tar.where} holds {others or 'no'} files and no image "
                f"({' '.join(sorted(IMAGE_EXTENSIONS))}): add its images or remove it"
            )
        classes[wnid] = files
        ignored += others
    return classes, ignored


def read_flat_tar(path: str) -> tuple[FileTable, int]:
    """The images of a tar, sorted by name, and how many other files there are.

    Raises:
        SourceError, OSError: see `members`; also for an image that is there twice.
    """
    return _read_images(whole(path))


def _read_images(tar: Stretch) -> tuple[FileTable, int]:
    images: dict[str, Member] = {}
    others = 0
    for member in members(tar):
        if member.hidden:
            continue
        if not is_image_name(member.name):
            others += 1
            continue
        # Unpacking would keep the last one alone.
        if member.base in images:
            raise SourceError(f"{tar.where} holds {member.base} twice: make it again with each image once")
        images[member.base] = member
    found = [images[base] for base in sorted(images)]
    return table_of(tar, found), others


def table_of(tar: Stretch, found: list[Member]) -> FileTable:
    """Some members of a tar as a table."""
    holder = Holder(tar.path, f"{tar.inside}/" if tar.inside else "", tar.state)
    names, offsets, sizes = zip(*found, strict=True) if found else ((), (), ())
    return FileTable.of(holder, names, sizes, offsets)


def _member(tar: Stretch, header: tarfile.TarInfo) -> Member | None:
    """A header's file; None for a folder."""
    name = header.name.removeprefix("./")
    if name.startswith("/") or ".." in name.split("/"):
        raise SourceError(f"{tar.where} holds {header.name!r}, a name that leads out of it: make it again without")
    if header.isdir():
        return None
    if not header.isreg() or header.issparse():
        kind = "link" if header.islnk() or header.issym() else "sparse file" if header.issparse() else "special file"
        raise SourceError(
            f"{tar.where} holds the {kind} {header.name!r}, which cannot be read in place: "
            "make it again with tar --dereference --hard-dereference and without --sparse"
        )
    return Member(name, tar.start + header.offset_data, header.size)


class Window(io.RawIOBase):
    """A stretch of a file as a file of its own, which is all that tarfile needs."""

    def __init__(self, tar: Stretch, data: bytes = b"") -> None:
        """Args: data: the whole file, where it was read before."""
        self.tar = tar
        self._position = 0
        ahead = data or is_url(tar.path)
        self._file = remote.ReadAhead(tar.path, tar.start + tar.size, data) if ahead else LocalRanges(tar.path)

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
