"""Where images come from, listed in a deterministic order, independent of the file system; nothing is unpacked.

A source is a folder of class folders (for ImageNet, named by wnid), a tar of class tars, a folder of class tars, a
WebDataset of images and labels, a flat folder or tars whose images have their wnids in their names, or a folder or tar
that holds any of these as train/ and val/, or ImageNet's own tars; each by a local path or a URL. Listing reads names,
headers and sizes; what an image holds is found out when its shard is written. Equal images give an equal listing in any
form.
"""

from __future__ import annotations

import collections
import hashlib
import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.sources.classes import DepthError, read_classes, read_flat, right_source
from pipeline.sources.file_table import Classes
from pipeline.sources.files import NAMED, SourceError
from pipeline.sources.listing import Entries, Listing
from pipeline.sources.splits import find_splits
from pipeline.sources.stored_listing import ListingStore
from pipeline.sources.tree import Tree, read_all, read_place
from pipeline.sources.val_labels import by_label
from pipeline.storage.locations import Location, is_url, shown


def permutation(seed: int, stream: str, count: int) -> NDArray[np.int64]:
    """A random order of 0..count-1 that depends on its arguments alone.

    It sorts Philox's raw words, whose values numpy promises for good, as it does not for `Generator.permutation`.
    """
    key = np.frombuffer(hashlib.sha256(f"{seed} {stream}".encode("utf-8", "surrogateescape")).digest()[:16], "<u8")
    words = np.random.Philox(key=key).random_raw(count)
    return np.argsort(words, kind="stable")


def check_output(output: Location, source: Location, source_val: Location | None) -> None:
    """Makes sure that a set is not written into what it is made of, where the next listing would find it.

    Raises:
        SourceError: if OUTPUT lies in SOURCE or SOURCE_VAL.
    """
    for flag, place in (("--source", source), ("--source-val", source_val)):
        if place is None:
            continue
        out, root = (
            location if is_url(location) else os.path.realpath(location)
            for location in (shown(output), shown(place).removeprefix("file://"))
        )
        if f"{out.rstrip('/')}/".startswith(f"{root.rstrip('/')}/"):
            raise SourceError(f"--output {out} lies in {flag} {root}: give --output a folder outside of it")


def read_source(
    source: Location,
    source_val: Location | None,
    val_fraction: float,
    seed: int,
    val_labels: Location | None = None,
    val_synsets: Location | None = None,
    store: ListingStore | None = None,
) -> Listing:
    """Lists a source.

    Args:
        source: see above.
        source_val: the images to validate on, in any form, or in one folder or tar without classes if `val_labels`
            names them; it goes before what SOURCE holds to validate on.
        val_fraction: without any validation images, the part of each class to split off, in (0, 1): at least one
            image of every class that has two.
        seed: decides which images are split off.
        val_labels: text file with the class of each validation image: a line each, in the order of their names, or
            rows of an image's name and its class.
        val_synsets: text file with "id wnid" a line, where `val_labels` holds the devkit's ids.
        store: where the listing is taken from if the source is as it was, and kept.

    Raises:
        SourceError: naming what was found, what is needed and what to do.
        ValueError: for a URL that cannot be opened.
        OSError: where something cannot be read.
    """
    if val_synsets is not None and val_labels is None:
        raise SourceError("--val-synsets explains the ids of --val-labels: give that too")
    given = None if source_val is None else _absolute(source_val)
    read = read_all
    if store is not None:
        texts = (None if text is None else _absolute(text) for text in (val_labels, val_synsets))
        if (stored := store.find([_absolute(source), given, *texts], val_fraction, seed)) is not None:
            return stored
        read = store.read_all
    root = read_place(_absolute(source), "--source")
    train_tree, val_tree, unread = find_splits(root, None if given is None else shown(given))
    if given is not None:
        val_tree = read_place(given, "--source-val")
    notes = [f"beside the images to train on, not read: {', '.join(unread)}"] if unread else []
    try:
        content = read_classes(train_tree, "--source", read=read)
    except DepthError as error:
        raise SourceError(f"{error}: {_where_to_look(train_tree, val_tree)}") from error
    train, others = content.classes, content.others
    classes = sorted(train)
    place = train_tree.where
    if len(classes) < 2:
        raise SourceError(
            f"{place} holds one class, {classes[0]!r}, at least 2 are needed: "
            "give --source the folder above all classes"
        )
    _check_unprintable(place, classes)
    roots = [place]
    if val_tree is None:
        if val_labels is not None:
            raise SourceError("--val-labels names the classes of validation images: give them with --source-val")
        train, val = _split_off(train, val_fraction, seed)
        if not any(len(files) for files in val.values()):
            raise SourceError(
                f"{place} has one image a class, so none can be split off to validate on: give --source-val"
            )
    else:
        roots.append(val_tree.where)
        if val_labels is None:
            try:
                content = read_classes(val_tree, "--source-val", content.names, read)
            except DepthError as error:
                raise SourceError(f"{error}: give --source-val {right_source(val_tree) or 'another folder'}") from error
            val = content.classes
        else:
            content = read_flat(val_tree)
            synsets = None if val_synsets is None else os.fspath(val_synsets)
            val, more = by_label(val_tree.where, content.classes[""], os.fspath(val_labels), synsets, classes)
            notes += more
        others += content.others
        unknown = sorted(set(val) - set(train))
        if unknown:
            raise SourceError(
                f"{roots[1]} has {len(unknown)} classes that {place} has not, the first {unknown[0]!r}: "
                f"name the classes of both alike{', or those of its images with --val-labels' if len(val) == 1 else ''}"
            )
    notes += _what_is_missing(classes, val, others)
    splits = {"train": Entries.of(classes, train), "val": Entries.of(classes, val)}
    listing = Listing(tuple(map(_printable, roots)), tuple(classes), splits, tuple(map(_printable, notes)))
    if store is not None:
        store.save(listing)
    return listing


def _printable(text: str) -> str:
    """A text with what is no UTF-8 in it written as \\udcXX: no terminal takes a file name in Latin-1 as it is."""
    return text.encode("utf-8", "backslashreplace").decode()


def _absolute(place: Location) -> str:
    location = os.fspath(place)
    return location if is_url(location) else os.path.abspath(location)


def _where_to_look(train: Tree, val: Tree | None) -> str:
    """The cure for folders where images are expected."""
    place = right_source(train)
    if place is None:
        return "move them beside the others, or it away"
    other = None if val is None else right_source(val, itself=True)
    return f"give --source {place}{'' if other is None else f' --source-val {other}'}"


def _what_is_missing(classes: Sequence[str], val: Classes, others: collections.Counter[str]) -> list[str]:
    """What a person should know of a source that is understood."""
    notes = []
    without = [name for name in classes if not len(val.get(name, ()))]
    if without:
        names = ", ".join(without[:NAMED]) + (", ..." if len(without) > NAMED else "")
        notes.append(f"classes without an image to validate on: {len(without):,} of {len(classes):,} ({names})")
    if others:
        kinds = ", ".join(f"{count:,} {extension or 'without one'}" for extension, count in others.most_common(NAMED))
        more = ", ..." if len(others) > NAMED else ""
        notes.append(
            f"files ignored, since their extensions are not those of images: {others.total():,} ({kinds}{more})"
        )
    return notes


def _check_unprintable(place: str, classes: Sequence[str]) -> None:
    """Raises SourceError for a class name that is no text: no program could show or store it."""
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise SourceError(f"{place} holds the class {name!r}, a name that is not UTF-8: rename it") from error


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
