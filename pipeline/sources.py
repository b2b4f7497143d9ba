"""Where images come from, listed in an order that no file system decides, and nothing unpacked.

A source is a folder of class folders (for ImageNet, named by wnid), a tar of class tars, a WebDataset of images and
labels, or a folder that holds any of these as train/ and val/, or ImageNet's own tars. Listing reads names, headers and
sizes; what an image holds is found out when its shard is written. Equal images give an equal listing in any form.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.class_names import names_of
from pipeline.folder_source import read_class_folders, read_flat_folder, subfolders
from pipeline.keys import key_of, make_unique
from pipeline.source_files import Classes, File, SourceError, is_image_name
from pipeline.tar_source import first_member, read_class_tars, read_flat_tar, whole
from pipeline.val_labels import by_label
from pipeline.webdataset_source import class_names, read_shards, shards_by_split, shards_of

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
_FORMS = "a folder of class folders, a tar of class tars, or a folder of WebDataset shards"


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One image of a source."""

    path: str
    """Absolute: of its file, or of the tar that holds it."""
    label: int
    """Its class's index."""
    wnid: str
    """Its class's name."""
    key: str
    """Its name in the shard set: [A-Za-z0-9_-]+, unique in its split even where case does not count."""
    size: int
    """In bytes; UNREADABLE for a broken link."""
    offset: int | None = None
    """Where it begins in the tar; None for a file of its own."""
    member: str = ""
    """Its name in the tar."""

    @property
    def where(self) -> str:
        """What a person looks for: its path, continued inside the tar."""
        return f"{self.path}/{self.member}" if self.member else self.path


@dataclasses.dataclass(frozen=True)
class Listing:
    """All images of a source."""

    roots: tuple[str, ...]
    """The folders or tars read, absolute."""
    classes: tuple[str, ...]
    """Sorted: a class's place is its label."""
    splits: dict[str, tuple[Entry, ...]]
    """train and val, each sorted by class and file name."""
    ignored: int
    """How many files were no images by their extension, hidden ones not counted."""

    @property
    def images(self) -> int:
        return sum(len(entries) for entries in self.splits.values())

    @property
    def class_names(self) -> tuple[str, ...]:
        """What a person calls each class."""
        return names_of(self.classes)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over every image's split, class, key and size, in order: not over where it lies."""
        digest = hashlib.sha256()
        for split, entries in self.splits.items():
            for entry in entries:
                line = f"{split}\t{entry.wnid}\t{entry.key}\t{entry.size}\n"
                digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class _Root:
    """Where the images of one split lie."""

    path: Path
    flag: str
    """The argument that named it."""
    shards: tuple[Path, ...] = ()
    """Of a WebDataset."""


def permutation(seed: int, stream: str, count: int) -> NDArray[np.int64]:
    """A random order of 0..count-1 that depends on its arguments alone.

    It sorts Philox's raw words, whose values numpy promises for good, as it does not for `Generator.permutation`.
    """
    key = np.frombuffer(hashlib.sha256(f"{seed} {stream}".encode("utf-8", "surrogateescape")).digest()[:16], "<u8")
    words = np.random.Philox(key=key).random_raw(count)
    return np.argsort(words, kind="stable")


def read_source(
    source: Path,
    source_val: Path | None,
    val_fraction: float,
    seed: int,
    val_labels: Path | None = None,
    val_synsets: Path | None = None,
) -> Listing:
    """Lists a source.

    Args:
        source: see above.
        source_val: the images to validate on, in any form, or in one folder or tar without classes if `val_labels`
            names them; it goes before what SOURCE holds to validate on.
        val_fraction: without any validation images, the part of each class to split off, in (0, 1): at least one
            image of every class that has two.
        seed: decides which images are split off.
        val_labels: text file with the class of each validation image, a line each, in the order of their names.
        val_synsets: text file with "id wnid" a line, where `val_labels` holds the devkit's ids.

    Raises:
        SourceError: naming what was found, what is needed and what to do.
        OSError: where something cannot be read.
    """
    if val_synsets is not None and val_labels is None:
        raise SourceError("--val-synsets explains the ids of --val-labels: give that too")
    source = Path(os.path.abspath(source))
    train_root, val_root = _find_roots(source, None if source_val is None else Path(os.path.abspath(source_val)))
    train, ignored, names = _read_root(train_root, None)
    classes = sorted(train)
    if len(classes) < 2:
        raise SourceError(
            f"{train_root.path} holds one class, {classes[0]!r}, at least 2 are needed: "
            "give --source the folder above all classes"
        )
    roots = [str(train_root.path)]
    if val_root is None:
        if val_labels is not None:
            raise SourceError("--val-labels names the classes of validation images: give them with --source-val")
        train, val = _split_off(train, val_fraction, seed)
        if not any(val.values()):
            raise SourceError(
                f"{train_root.path} has one image a class, so none can be split off to validate on: give --source-val"
            )
    else:
        roots.append(str(val_root.path))
        if val_labels is None:
            val, more, _ = _read_root(val_root, names)
        else:
            files, more = _read_flat(val_root)
            val = by_label(val_root.path, files, val_labels, val_synsets, classes)
        ignored += more
        unknown = sorted(set(val) - set(train))
        if unknown:
            raise SourceError(
                f"{val_root.path} has {len(unknown)} classes that {train_root.path} has not, the first {unknown[0]!r}: "
                "name the classes of both alike"
            )
    return Listing(
        tuple(roots), tuple(classes), {"train": _entries(classes, train), "val": _entries(classes, val)}, ignored
    )


def _find_roots(source: Path, source_val: Path | None) -> tuple[_Root, _Root | None]:
    """Where the training and the validation images lie; None where validation is to be split off."""
    _require(source, "--source")
    if source_val is not None:
        _require(source_val, "--source-val")
    train, val = _Root(source, "--source"), None
    if source.is_dir():
        folder = source / "train"
        if (source / TRAIN_TAR).is_file():
            train = _Root(source / TRAIN_TAR, "--source")
        # A class may be called "train": only where it holds folders or shards itself is it a split.
        elif folder.is_dir() and (subfolders(folder)[0] or shards_of(folder)):
            train = _Root(folder, "--source", _shards_in(folder))
        elif shards := _shards_in(source):
            by_split = shards_by_split(source, shards)
            train = _Root(source, "--source", by_split["train"])
            if "val" in by_split:
                val = _Root(source, "--source-val", by_split["val"])
        if train.path != source:
            there = [path for path in (source / "val", source / VAL_TAR) if path.exists()]
            val = _Root(there[0], "--source-val", _shards_in(there[0])) if there else None
    if source_val is not None:
        val = _Root(source_val, "--source-val", _shards_in(source_val))
    return train, val


def _shards_in(folder: Path) -> tuple[Path, ...]:
    """The shards in a folder that is a WebDataset; none where it is a file or holds folders of classes."""
    return shards_of(folder) if folder.is_dir() and not subfolders(folder)[0] else ()


def _require(path: Path, flag: str) -> None:
    if not path.exists():
        raise SourceError(f"{path} does not exist: give {flag} {_FORMS}")


def _read_root(root: _Root, names: tuple[str, ...] | None) -> tuple[Classes, int, tuple[str, ...] | None]:
    """The images of a root by class, how many other files there are, and a WebDataset's class names by label.

    Args:
        names: of the labels of a WebDataset without names of its own; None for the training set's.
    """
    path, flag = root.path, root.flag
    if root.shards:
        own = class_names(path)
        if own is None and names is None and flag == "--source-val":
            raise SourceError(
                f"{path} numbers its classes and --source names them: give shards for both, or class folders for both"
            )
        return read_shards(path, root.shards, own or names)
    if path.is_dir():
        return *read_class_folders(path, flag), None
    first = first_member(whole(path))
    if first is None:
        raise SourceError(f"{path} holds no files: give {flag} {_FORMS}")
    if first.name.endswith(".tar"):
        return *read_class_tars(path, flag), None
    if flag == "--source-val" and is_image_name(first.name):
        raise SourceError(
            f"{path} holds images and not their classes: name these with --val-labels, a text file with the wnid of "
            "each image, or its id in the devkit, in the order of their names"
        )
    raise SourceError(f"{path} begins with {first.name!r} and not with a class tar: give {flag} {_FORMS}")


def _read_flat(root: _Root) -> tuple[list[File], int]:
    """Validation images that lie beside each other, without classes."""
    folders = subfolders(root.path)[0] if root.path.is_dir() else []
    files, others = ([], 0) if folders else (read_flat_folder if root.path.is_dir() else read_flat_tar)(root.path)
    if not files:
        raise SourceError(
            f"{root.path} holds {'folders' if folders else f'{others} files'} and no images beside each other: "
            "--val-labels is for those; leave it out for images in classes"
        )
    return files, others


def _split_off(classes: Classes, fraction: float, seed: int) -> tuple[Classes, Classes]:
    """Deals each class into training and validation, each class by its own name's stream."""
    train, val = {}, {}
    for name, files in classes.items():
        count = min(max(round(len(files) * fraction), 1), len(files) - 1)
        chosen = set(permutation(seed, f"validation {name}", len(files))[:count].tolist())
        train[name] = [file for i, file in enumerate(files) if i not in chosen]
        val[name] = [file for i, file in enumerate(files) if i in chosen]
    return train, val


def _entries(classes: list[str], files: Classes) -> tuple[Entry, ...]:
    listed = [(label, name, file) for label, name in enumerate(classes) for file in files.get(name, [])]
    keys = make_unique(key_of(name, file.name) for _, name, file in listed)
    return tuple(
        Entry(file.path, label, name, key, file.size, file.offset, file.member)
        for (label, name, file), key in zip(listed, keys, strict=True)
    )
