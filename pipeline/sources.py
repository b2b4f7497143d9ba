"""Where images come from: folders named by class, listed in an order that no file system decides.

A source is a folder of class folders (for ImageNet, named by wnid), or a folder that holds `train/` and `val/`, each a
folder of class folders. Listing reads names and sizes only; what an image holds is found out when its shard is written.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

IMAGE_EXTENSIONS = frozenset({".jpeg", ".jpg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"})
LISTING_THREADS = 16  # A network disk answers many at once; a local one does not mind.
# A USTAR member's name has 100 bytes; the rest is room for ".jpg" and what keeps two keys apart.
MAX_KEY = 80
UNREADABLE = -1
_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")

File = tuple[str, int]
"""A file's absolute path and its size in bytes, UNREADABLE where it has none."""


class SourceError(ValueError):
    """A source that is missing, empty, or not laid out as a data set."""


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One image of a source."""

    path: str
    """Absolute."""
    label: int
    """Its class's index."""
    wnid: str
    """Its class's name."""
    key: str
    """Its name in the shard set: [A-Za-z0-9_-]+, unique in its split even where case does not count."""
    size: int
    """In bytes; UNREADABLE for a broken link."""


@dataclasses.dataclass(frozen=True)
class Listing:
    """All images of a source."""

    roots: tuple[str, ...]
    """The folders read, absolute."""
    classes: tuple[str, ...]
    """Sorted: a class's place is its label."""
    splits: dict[str, tuple[Entry, ...]]
    """train and val, each sorted by class and file name."""
    ignored: int
    """How many files were no images by their extension, hidden ones not counted."""

    @property
    def images(self) -> int:
        return sum(len(entries) for entries in self.splits.values())

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over every image's split, class, key and size, in order."""
        digest = hashlib.sha256()
        for split, entries in self.splits.items():
            for entry in entries:
                line = f"{split}\t{entry.wnid}\t{entry.key}\t{entry.size}\n"
                digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def permutation(seed: int, stream: str, count: int) -> NDArray[np.int64]:
    """A random order of 0..count-1 that depends on its arguments alone.

    It sorts Philox's raw words, whose values numpy promises for good, as it does not for `Generator.permutation`.
    """
    key = np.frombuffer(hashlib.sha256(f"{seed} {stream}".encode("utf-8", "surrogateescape")).digest()[:16], "<u8")
    words = np.random.Philox(key=key).random_raw(count)
    return np.argsort(words, kind="stable")


def read_source(source: Path, source_val: Path | None, val_fraction: float, seed: int) -> Listing:
    """Lists a source.

    Args:
        source: a folder of class folders, or one that holds train/ and perhaps val/.
        source_val: a folder of class folders to validate on; it goes before SOURCE/val.
        val_fraction: without any validation folder, the part of each class to split off, in (0, 1): at least one
            image of every class that has two.
        seed: decides which images are split off.

    Raises:
        SourceError: naming what was found, what is needed and what to do.
        OSError: where a folder cannot be read.
    """
    source = Path(os.path.abspath(source))
    train_root, val_root = _find_roots(source, None if source_val is None else Path(os.path.abspath(source_val)))
    train, ignored = _read_classes(train_root, "--source")
    classes = sorted(train)
    if len(classes) < 2:
        raise SourceError(
            f"{train_root} holds one class, {classes[0]!r}, at least 2 are needed: "
            "give --source the folder above all classes"
        )
    roots = [str(train_root)]
    if val_root is None:
        train, val = _split_off(train, val_fraction, seed)
        if not any(val.values()):
            raise SourceError(
                f"{train_root} has one image a class, so none can be split off to validate on: give --source-val"
            )
    else:
        roots.append(str(val_root))
        val, more = _read_classes(val_root, "--source-val")
        ignored += more
        unknown = sorted(set(val) - set(train))
        if unknown:
            raise SourceError(
                f"{val_root} has {len(unknown)} classes that {train_root} has not, the first {unknown[0]!r}: "
                "name the class folders of both alike"
            )
    return Listing(
        tuple(roots), tuple(classes), {"train": _entries(classes, train), "val": _entries(classes, val)}, ignored
    )


def _find_roots(source: Path, source_val: Path | None) -> tuple[Path, Path | None]:
    """The folders that hold the training and the validation classes; None where validation is to be split off."""
    _require_folder(source, "--source")
    if source_val is not None:
        _require_folder(source_val, "--source-val")
    train = source / "train"
    # A class may be called "train": only where it holds folders itself is it a split.
    if not (train.is_dir() and _subfolders(train)[0]):
        return source, source_val
    if source_val is None and (source / "val").is_dir():
        return train, source / "val"
    return train, source_val


def _require_folder(path: Path, flag: str) -> None:
    if not path.exists():
        raise SourceError(f"{path} does not exist: give {flag} a folder of class folders")
    if not path.is_dir():
        raise SourceError(f"{path} is a file: unpack it and give {flag} the folder of class folders")


def _subfolders(root: Path) -> tuple[list[str], int]:
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


def _read_classes(root: Path, flag: str) -> tuple[dict[str, list[File]], int]:
    """The images of each class folder, sorted by name, and how many other files there are."""
    names, ignored = _subfolders(root)
    if not names:
        raise SourceError(
            f"{root} holds {ignored or 'no'} files and no class folders: "
            f"give {flag} a folder with one folder of images a class"
        )
    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        listed = list(pool.map(_read_class, (root / name for name in names)))
    for name, (files, others) in zip(names, listed, strict=True):
        if not files:
            raise SourceError(
                f"the class folder {root / name} holds {others or 'no'} files and no image "
                f"({' '.join(sorted(IMAGE_EXTENSIONS))}): add its images or remove it"
            )
        ignored += others
    return {name: files for name, (files, _) in zip(names, listed, strict=True)}, ignored


def _read_class(folder: Path) -> tuple[list[File], int]:
    files, others = [], 0
    with os.scandir(folder) as items:
        for item in items:
            if item.name.startswith("."):
                continue
            size = _image_size(item)
            if size is None:
                others += 1
            else:
                files.append((item.path, size))
    return sorted(files), others


def _image_size(item: os.DirEntry[str]) -> int | None:
    """An image file's size in bytes, UNREADABLE for one that cannot be reached, None for what is no image file."""
    if os.path.splitext(item.name)[1].lower() not in IMAGE_EXTENSIONS:
        return None
    try:
        status = item.stat()
    except OSError:
        return UNREADABLE
    # A pipe called x.jpg would be waited for without end.
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _split_off(
    classes: dict[str, list[File]], fraction: float, seed: int
) -> tuple[dict[str, list[File]], dict[str, list[File]]]:
    """Deals each class into training and validation, each class by its own name's stream."""
    train, val = {}, {}
    for name, files in classes.items():
        count = min(max(round(len(files) * fraction), 1), len(files) - 1)
        chosen = set(permutation(seed, f"validation {name}", len(files))[:count].tolist())
        train[name] = [file for i, file in enumerate(files) if i not in chosen]
        val[name] = [file for i, file in enumerate(files) if i in chosen]
    return train, val


def _entries(classes: list[str], files: dict[str, list[File]]) -> tuple[Entry, ...]:
    listed = [(label, name, path, size) for label, name in enumerate(classes) for path, size in files.get(name, [])]
    keys = _unique(_key(name, path) for _, name, path, _ in listed)
    return tuple(
        Entry(path, label, name, key, size) for (label, name, path, size), key in zip(listed, keys, strict=True)
    )


def _key(name: str, path: str) -> str:
    """What an image is called in the shard set, before what makes it unique."""
    stem = os.path.splitext(os.path.basename(path))[0]
    key = escape(stem if stem.startswith(name) else f"{name}_{stem}")
    if len(key) <= MAX_KEY:
        return key
    return f"{key[: MAX_KEY - 17]}_{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def escape(text: str) -> str:
    """Writes each character that is not [A-Za-z0-9_-] as _xHH for each of its UTF-8 bytes.

    A dot would end a WebDataset key and a space would break a line of DALI's index.
    """
    return "".join(
        character
        if character in _PLAIN
        else "".join(f"_x{byte:02X}" for byte in character.encode("utf-8", "surrogateescape"))
        for character in text
    )


def _unique(keys: Iterable[str]) -> list[str]:
    """Adds _2, _3, ... to a key that was there before, case aside: a shard unpacked on any disk keeps every file."""
    taken: set[str] = set()
    following: dict[str, int] = {}
    unique = []
    for key in keys:
        candidate, folded = key, key.lower()
        while candidate.lower() in taken:
            following[folded] = following.get(folded, 1) + 1
            candidate = f"{key}_{following[folded]}"
        taken.add(candidate.lower())
        unique.append(candidate)
    return unique
