"""Images inside tars, found by their headers and read where they lie: nothing is unpacked.

ImageNet's training images come as one tar of 1000 class tars, its validation images as one flat tar.
"""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.source_files import IMAGE_EXTENSIONS, LISTING_THREADS, Classes, File, SourceError, is_image_name

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

    path: Path
    start: int
    size: int
    inside: str = ""
    """Its name in the outer tar."""

    @property
    def where(self) -> str:
        return f"{self.path}/{self.inside}" if self.inside else str(self.path)


def whole(path: Path) -> Stretch:
    """A tar file as it is."""
    return Stretch(path, 0, path.stat().st_size)


def members(tar: Stretch) -> Generator[Member]:
    """The regular files of a tar, in its order, each header read and no contents.

    Raises:
        SourceError: if it is compressed, cut off or damaged, or holds a member that is neither a file nor a folder, or
            one whose name leads out of the tar.
        OSError: if it cannot be read.
    """
    last = ""
    with contextlib.closing(_Window(tar)) as file:
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


def first_member(tar: Stretch) -> Member | None:
    """A tar's first file that is not hidden; None where there is none."""
    with contextlib.closing(members(tar)) as found:
        return next((member for member in found if not member.hidden), None)


def read_class_tars(path: Path, flag: str) -> tuple[Classes, int]:
    """The images of a tar of class tars by class, sorted by name, and how many other files there are.

    Raises:
        SourceError, OSError: see `members`; also for a class or an image that is there twice.
    """
    tars: dict[str, Stretch] = {}
    ignored = 0
    for member in members(whole(path)):
        wnid, extension = os.path.splitext(member.base)
        if member.hidden:
            continue
        if extension.lower() != ".tar":
            ignored += 1
            continue
        if wnid in tars:
            raise SourceError(f"{path} holds the class tar {member.base} twice: make it again with one tar a class")
        tars[wnid] = Stretch(path, member.offset, member.size, member.name)
    if not tars:
        raise SourceError(
            f"{path} holds {ignored or 'no'} files and no class tars: give {flag} a tar of one tar a class"
        )
    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        listed = list(pool.map(_read_images, tars.values()))
    classes = {}
    for (wnid, tar), (files, others) in sorted(zip(tars.items(), listed, strict=True)):
        if not files:
            raise SourceError(
                f"the class tar {tar.where} holds {others or 'no'} files and no image "
                f"({' '.join(sorted(IMAGE_EXTENSIONS))}): add its images or remove it"
            )
        classes[wnid] = files
        ignored += others
    return classes, ignored


def read_flat_tar(path: Path) -> tuple[list[File], int]:
    """The images of a tar, sorted by name, and how many other files there are.

    Raises:
        SourceError, OSError: see `members`; also for an image that is there twice.
    """
    return _read_images(whole(path))


def _read_images(tar: Stretch) -> tuple[list[File], int]:
    files: dict[str, File] = {}
    others = 0
    for member in members(tar):
        if member.hidden:
            continue
        if not is_image_name(member.name):
            others += 1
            continue
        # Unpacking would keep the last one alone.
        if member.base in files:
            raise SourceError(f"{tar.where} holds {member.base} twice: make it again with each image once")
        inside = f"{tar.inside}/{member.name}" if tar.inside else member.name
        files[member.base] = File(str(tar.path), member.size, member.offset, inside)
    return [files[name] for name in sorted(files)], others


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


class _Window(io.RawIOBase):
    """A stretch of a file as a file of its own, which is all that tarfile needs."""

    def __init__(self, tar: Stretch) -> None:
        self._start = tar.start
        self._size = tar.size
        self._position = 0
        self._file = os.open(tar.path, os.O_RDONLY)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self._size - self._position))
        data = os.pread(self._file, length, self._start + self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            os.close(self._file)
        super().close()
