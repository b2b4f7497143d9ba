"""The classes of a flat set of validation images, from a text file with one label a line."""

from __future__ import annotations

import collections
from collections.abc import Collection

import numpy as np

from pipeline.sources.file_table import Classes, FileTable
from pipeline.sources.files import SourceError, read_bytes
from pipeline.storage.locations import shown


def by_label(root: str, files: FileTable, labels: str, synsets: str | None, classes: Collection[str]) -> Classes:
    """Puts the images of ROOT into classes.

    Args:
        files: sorted by name; line i of the labels belongs to the i-th.
        labels: one class name a line, or one of the devkit's ids.
        synsets: "id wnid" a line, for labels that are ids.
        classes: the names that there are.

    Raises:
        SourceError: if the counts differ, a label is of no class, or the order of the images is open to doubt.
        OSError: if a file cannot be read.
    """
    first = next(files.names())
    if any(len(name) != len(first) for name in files.names()):
        raise SourceError(
            f"{shown(root)} holds {first!r} and names of other lengths, so their order is open to doubt: "
            "number the images with leading zeros, as ILSVRC2012_val_00000001.JPEG is"
        )
    names = _read_names(labels, synsets, classes)
    if len(names) != len(files):
        raise SourceError(
            f"{shown(labels)} has {len(names):,} labels and {shown(root)} {len(files):,} images: "
            "give one label a line, in the order of the images' names"
        )
    rows = collections.defaultdict(list)
    for row, name in enumerate(names):
        rows[name].append(row)
    return {name: files.take(np.array(mine)) for name, mine in rows.items()}


def _read_names(labels: str, synsets: str | None, classes: Collection[str]) -> list[str]:
    lines = _lines(labels, "--val-labels")
    labels = shown(labels)
    known = set(classes)
    if known.issuperset(lines):
        return lines
    number, odd = next((i, line) for i, line in enumerate(lines, start=1) if line not in known)
    if not all(line.isdigit() for line in lines):
        raise SourceError(
            f"line {number} of {labels} is {odd[:60]!r}, which is no class of --source: "
            "give one class name, or one of the devkit's ids, a line"
        )
    if synsets is None:
        raise SourceError(
            f"{labels} holds numbers: the devkit counts classes in an order of its own, not by wnid, so give "
            "--val-synsets a text file with 'id wnid' a line"
        )
    wnids = _read_synsets(synsets)
    synsets = shown(synsets)
    for number, line in enumerate(lines, start=1):
        wnid = wnids.get(int(line))
        if wnid is None:
            raise SourceError(f"line {number} of {labels} is {line}, which {synsets} does not list: give the devkit's")
        if wnid not in known:
            raise SourceError(
                f"line {number} of {labels} is {line}, which {synsets} calls {wnid!r}: --source has no such class"
            )
    return [wnids[int(line)] for line in lines]


def _read_synsets(path: str) -> dict[int, str]:
    wnids: dict[int, str] = {}
    lines = _lines(path, "--val-synsets")
    path = shown(path)
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if len(fields) < 2 or not fields[0].isdigit():
            raise SourceError(f"line {number} of {path} is {line[:60]!r}: give 'id wnid' a line, as '1 n02119789'")
        if int(fields[0]) in wnids:
            raise SourceError(f"line {number} of {path} gives the id {fields[0]} again: list each id once")
        wnids[int(fields[0])] = fields[1]
    return wnids


def _lines(path: str, flag: str) -> list[str]:
    """A text file's lines, stripped; empty ones at its end are none."""
    try:
        text = read_bytes(path, None, 0).decode("utf-8")
    except FileNotFoundError:
        raise SourceError(f"{shown(path)} does not exist: give {flag} a text file") from None
    except UnicodeDecodeError:
        raise SourceError(f"{shown(path)} is no text: give {flag} a text file (not the devkit's meta.mat)") from None
    return [line.strip() for line in text.rstrip().splitlines()]
