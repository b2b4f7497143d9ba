"""Images in folders named by class, on a disk or in an object store. Listing reads names and sizes only."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from pipeline.sources.file_table import Classes, FileTable, Holder
from pipeline.sources.files import IMAGE_EXTENSIONS, LISTING_THREADS, UNREADABLE, SourceError, is_image_name
from pipeline.storage import remote
from pipeline.storage.locations import child, is_url, shown
from pipeline.storage.remote import Item


def scan(folder: str) -> Iterator[Item]:
    """What lies in a folder, hidden things not counted; what cannot be reached has the size UNREADABLE.

    Raises:
        OSError: if the folder cannot be read.
    """
    items = remote.scan(folder) if is_url(folder) else _scan_disk(folder)
    return (item for item in items if not item.name.startswith("."))


def _scan_disk(folder: str) -> Iterator[Item]:
    with os.scandir(folder) as items:
        for item in items:
            try:
                is_folder = item.is_dir()
                status = None if is_folder else item.stat()
            except OSError:
                yield Item(item.name, False, UNREADABLE)
                continue
            # A pipe called x.jpg would be waited for without end.
            size = status.st_size if status is not None and stat.S_ISREG(status.st_mode) else None
            yield Item(item.name, is_folder, size)


def read_class_folders(root: str, names: tuple[str, ...], others: int, flag: str) -> tuple[Classes, int]:
    """The images of each class folder, sorted by name, and how many other files there are.

    Args:
        names: of the folders in `root`.
        others: how many files lie beside them.
    """
    if not names:
        raise SourceError(
            f"{shown(root)} holds {others or 'no'} files and no class folders: "
            f"give {flag} a folder with one folder of images a class"
            + (", or name the classes of its images with --val-labels" if others and flag == "--source-val" else "")
        )
    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        listed = list(pool.map(read_flat_folder, (child(root, name) for name in names)))
    for name, (files, more) in zip(names, listed, strict=True):
        if not len(files):
            raise SourceError(
                f"the class folder {shown(child(root, name))} holds {more or 'no'} files and no image "
                f"({' '.join(sorted(IMAGE_EXTENSIONS))}): add its images or remove it"
            )
        others += more
    return {name: files for name, (files, _) in zip(names, listed, strict=True)}, others


def read_flat_folder(folder: str) -> tuple[FileTable, int]:
    """The images that lie in a folder itself, sorted by name, and how many other things do."""
    images, others = [], 0
    for item in scan(folder):
        if item.folder:
            raise SourceError(
                f"the folder of images {shown(folder)} holds the folder {item.name!r}, whose images would be left out: "
                "move them beside the others, or it away"
            )
        if item.size is None or not is_image_name(item.name):
            others += 1
        else:
            images.append((item.name, item.size))
    images.sort()
    return FileTable.of(Holder(folder), [name for name, _ in images], [size for _, size in images]), others
