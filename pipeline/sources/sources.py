"""Where images come from, listed in a deterministic order, independent of the file system; nothing is unpacked.

A source is a folder of class folders (for ImageNet, named by wnid), a tar of class tars, a folder of class tars, a
WebDataset of images and labels, or a folder that holds any of these as train/ and val/, or ImageNet's own tars; each by
a local path or a URL. Listing reads names, headers and sizes; what an image holds is found out when its shard is
written. Equal images give an equal listing in any form.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import braceexpand
import numpy as np
from numpy.typing import NDArray
from pyarrow import fs

from pipeline.sources.file_table import Classes, FileTable
from pipeline.sources.files import SourceError
from pipeline.sources.folders import read_class_folders, read_flat_folder, scan
from pipeline.sources.listing import Entries, Listing
from pipeline.sources.tars import read_class_tars, read_flat_tar, read_tar_of_tars
from pipeline.sources.val_labels import by_label
from pipeline.sources.webdatasets import Tars, class_names, contents_of, read_shards, shards_by_split
from pipeline.storage import remote
from pipeline.storage.locations import child, is_http, is_url, shown

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
_FORMS = "a folder of class folders, a tar or a folder of class tars, or a folder of WebDataset shards"

Location = str | os.PathLike[str]
"""A local path, or a URL."""


@dataclasses.dataclass(frozen=True)
class _Root:
    """Where the images of one split lie: a tar, a folder, or some tars together."""

    location: str
    flag: str
    """The argument that named it."""
    is_folder: bool = False
    folders: tuple[str, ...] = ()
    """The names of the folders in a folder, sorted."""
    tars: Tars = dataclasses.field(default_factory=dict)
    """The tars in a folder, or those that {000..146} stands for."""
    others: int = 0
    """How many things in a folder are no folders."""


def permutation(seed: int, stream: str, count: int) -> NDArray[np.int64]:
    """A random order of 0..count-1 that depends on its arguments alone.

    It sorts Philox's raw words, whose values numpy promises for good, as it does not for `Generator.permutation`.
    """
    key = np.frombuffer(hashlib.sha256(f"{seed} {stream}".encode("utf-8", "surrogateescape")).digest()[:16], "<u8")
    words = np.random.Philox(key=key).random_raw(count)
    return np.argsort(words, kind="stable")


def read_source(
    source: Location,
    source_val: Location | None,
    val_fraction: float,
    seed: int,
    val_labels: Location | None = None,
    val_synsets: Location | None = None,
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
        ValueError: for a URL that cannot be opened.
        OSError: where something cannot be read.
    """
    if val_synsets is not None and val_labels is None:
        raise SourceError("--val-synsets explains the ids of --val-labels: give that too")
    root = _look(source, "--source")
    train_root, val_root = _inside(root)
    if source_val is not None:
        val_root = _look(source_val, "--source-val")
    train, ignored, names = _read_root(train_root, None)
    classes = sorted(train)
    place = shown(train_root.location)
    if len(classes) < 2:
        raise SourceError(
            f"{place} holds one class, {classes[0]!r}, at least 2 are needed: "
            "give --source the folder above all classes"
        )
    _check_unprintable(place, classes)
    roots = [place]
    if val_root is None:
        if val_labels is not None:
            raise SourceError("--val-labels names the classes of validation images: give them with --source-val")
        train, val = _split_off(train, val_fraction, seed)
        if not any(len(files) for files in val.values()):
            raise SourceError(
                f"{place} has one image a class, so none can be split off to validate on: give --source-val"
            )
    else:
        roots.append(shown(val_root.location))
        if val_labels is None:
            val, more, _ = _read_root(val_root, names)
        else:
            files, more = _read_flat(val_root)
            synsets = None if val_synsets is None else os.fspath(val_synsets)
            val = by_label(val_root.location, files, os.fspath(val_labels), synsets, classes)
        ignored += more
        unknown = sorted(set(val) - set(train))
        if unknown:
            raise SourceError(
                f"{roots[1]} has {len(unknown)} classes that {place} has not, the first {unknown[0]!r}: "
                "name the classes of both alike"
            )
    splits = {"train": Entries.of(classes, train), "val": Entries.of(classes, val)}
    return Listing(tuple(roots), tuple(classes), splits, ignored, _unread(root, train_root, val_root))


def _look(place: Location, flag: str) -> _Root:
    """What lies at a local path or URL."""
    location = os.fspath(place)
    location = location if is_url(location) else os.path.abspath(location)
    if "{" in location and not (not is_url(location) and os.path.exists(location)):
        return _Root(location, flag, tars=_expanded(location))
    if is_http(location) and not location.partition("?")[0].lower().endswith(".tar"):
        raise SourceError(
            f"{shown(location)} is no tar, and HTTP cannot list folders: give {flag} http://HOST/NAME.tar, "
            "or shards as http://HOST/NAME-{000000..000146}.tar"
        )
    if is_url(location):
        kind = remote.kind(location)
    else:
        path = Path(location)
        kind = fs.FileType.Directory if path.is_dir() else fs.FileType.File if path.exists() else fs.FileType.NotFound
    if kind == fs.FileType.NotFound:
        raise SourceError(f"{shown(location)} does not exist: give {flag} {_FORMS}")
    if kind != fs.FileType.Directory:
        return _Root(location, flag)
    items = sorted(scan(location))
    names = [item.name for item in items if not item.folder and item.name.endswith(".tar")]
    return _Root(
        location,
        flag,
        is_folder=True,
        folders=tuple(item.name for item in items if item.folder),
        tars={name: child(location, name) for name in names},
        others=sum(not item.folder for item in items),
    )


def _check_unprintable(place: str, classes: Sequence[str]) -> None:
    """Raises SourceError for a class name that is no text: no program could show or store it."""
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise SourceError(f"{place} holds the class {name!r}, a name that is not UTF-8: rename it") from error


def _expanded(pattern: str) -> Tars:
    """The tars that a pattern with {000..146} stands for.

    Raises:
        SourceError: if two have one name, by which classes and splits are told.
    """
    tars: dict[str, str] = {}
    for tar in braceexpand.braceexpand(pattern):
        name = os.path.basename(shown(tar))
        if tars.setdefault(name, tar) != tar:
            raise SourceError(
                f"{shown(tars[name])} and {shown(tar)} have the same name: name the tars apart, as by links in a folder"
            )
    return dict(sorted(tars.items()))


def _inside(root: _Root) -> tuple[_Root, _Root | None]:
    """Where in SOURCE the images to train on and those to validate on lie; None where these are to be split off."""
    val = None
    if VAL_TAR in root.tars:
        val = _Root(root.tars[VAL_TAR], "--source-val")
    if "val" in root.folders:
        val = _look(child(root.location, "val"), "--source-val")
    if TRAIN_TAR in root.tars:
        return _Root(root.tars[TRAIN_TAR], root.flag), val
    if "train" in root.folders:
        train = _look(child(root.location, "train"), root.flag)
        # A class may be called "train": only where it holds folders or tars itself is it a split.
        if train.folders or train.tars:
            return train, val
    tars = {name: location for name, location in root.tars.items() if name != VAL_TAR}
    if not tars or set(root.folders) - {"val"}:
        return root, None
    train = dataclasses.replace(root, folders=(), tars=tars)
    if contents_of(next(iter(tars.values())))[0] != "images":
        by_split = shards_by_split(root.location, tars)
        train = dataclasses.replace(train, tars=by_split["train"])
        if "val" in by_split:
            val = dataclasses.replace(train, flag="--source-val", tars=by_split["val"])
    return train, val


def _unread(root: _Root, train: _Root, val: _Root | None) -> tuple[str, ...]:
    """The folders beside a split's that are no split, as test/ is, or validation/."""
    if train.location == root.location:
        return ()
    read = {train.location} | ({val.location} if val else set())
    return tuple(name for name in root.folders if child(root.location, name) not in read)


def _read_root(root: _Root, names: tuple[str, ...] | None) -> tuple[Classes, int, tuple[str, ...] | None]:
    """The images of a root by class, how many other files there are, and a WebDataset's class names by label.

    Args:
        names: of the labels of a WebDataset without names of its own; None for the training set's.
    """
    location, flag = root.location, root.flag
    if root.is_folder and (root.folders or not root.tars):
        return *read_class_folders(location, root.folders, root.others, flag), None
    tars = root.tars or {os.path.basename(shown(location)): location}
    kind, first = contents_of(next(iter(tars.values())))
    if root.tars and kind == "images":
        return *read_class_tars(tars), None
    if root.tars or kind == "samples":
        own = class_names(tars)
        if own is None and names is None and flag == "--source-val":
            raise SourceError(
                f"{shown(location)} numbers its classes and --source names them: "
                "give shards for both, or class folders for both"
            )
        return read_shards(location, tars, own or names)
    if first.endswith(".tar"):
        return *read_tar_of_tars(location, flag), None
    if not first:
        raise SourceError(f"{shown(location)} holds no files: give {flag} {_FORMS}")
    if flag == "--source-val" and kind == "images":
        raise SourceError(
            f"{shown(location)} holds images and not their classes: name these with --val-labels, a text file with the "
            "wnid of each image, or its id in the devkit, in the order of their names"
        )
    raise SourceError(f"{shown(location)} begins with {first!r} and not with a class tar: give {flag} {_FORMS}")


def _read_flat(root: _Root) -> tuple[FileTable, int]:
    """Validation images that lie beside each other, without classes."""
    together = root.folders or (root.tars and not root.is_folder)
    if together:
        files, others = FileTable.joined([]), 0
    else:
        files, others = (read_flat_folder if root.is_folder else read_flat_tar)(root.location)
    if not len(files):
        what = "folders" if root.folders else f"{others} files"
        raise SourceError(
            f"{shown(root.location)} holds {what} and no images beside each other: "
            "--val-labels is for those; leave it out for images in classes"
        )
    return files, others


def _split_off(classes: Classes, fraction: float, seed: int) -> tuple[Classes, Classes]:
    """Deals each class into training and validation, each class by its own name's stream."""
    train, val = {}, {}
    for name, files in classes.items():
        count = min(max(round(len(files) * fraction), 1), len(files) - 1)
        chosen = np.zeros(len(files), np.bool_)
        chosen[permutation(seed, f"validation {name}", len(files))[:count]] = True
        train[name] = files.take(np.flatnonzero(~chosen))
        val[name] = files.take(np.flatnonzero(chosen))
    return train, val
