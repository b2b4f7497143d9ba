"""Images in folders named by class. Listing reads names and sizes only."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.source_files import (
    IMAGE_EXTENSIONS,
    LISTING_THREADS,
    UNREADABLE,
    Classes,
    File,
    SourceError,
    is_image_name,
)


def subfolders(root: Path) -> tuple[list[str], int]:
    """The names of a folder's folders, sorted, and how many other things lie in it; hidden ones not counted."""
    folders, others = [], 0
    with os.scandir(root) as items:
        for item in items:
            if item.name.startswith("."):
                continue
            if item.is_dir():
                folders.append(item.name)
            else:
                others += 1
    return sorted(folders), others


def read_class_folders(root: Path, flag: str) -> tuple[Classes, int]:
    """The images of each class folder, sorted by name, and how many other files there are."""
    names, ignored = subfolders(root)
    if not names:
        raise SourceError(
            f"{root} holds {ignored or 'no'} files and no class folders: "
            f"give {flag} a folder with one folder of images a class"
            + (", or name the classes of its images with --val-labels" if ignored and flag == "--source-val" else "")
        )
    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        listed = list(pool.map(read_flat_folder, (root / name for name in names)))
    for name, (files, others) in zip(names, listed, strict=True):
        if not files:
            raise SourceError(
                f"the class folder {root / name} holds {others or 'no'} files and no image "
                f"({' '.join(sorted(IMAGE_EXTENSIONS))}): add its images or remove it"
            )
        ignored += others
    return {name: files for name, (files, _) in zip(names, listed, strict=True)}, ignored


def read_flat_folder(folder: Path) -> tuple[list[File], int]:
    """The images that lie in a folder itself, sorted by name, and how many other things do."""
    files, others = [], 0
    with os.scandir(folder) as items:
        for item in items:
            if item.name.startswith("."):
                continue
            size = _image_size(item)
            if size is None:
                others += 1
            else:
                files.append(File(item.path, size))
    return sorted(files), others


def _image_size(item: os.DirEntry[str]) -> int | None:
    """An image file's size in bytes, UNREADABLE for one that cannot be reached, None for what is no image file."""
    if not is_image_name(item.name):
        return None
    try:
        status = item.stat()
    except OSError:
        return UNREADABLE
    # A pipe called x.jpg would be waited for without end.
    return status.st_size if stat.S_ISREG(status.st_mode) else None
