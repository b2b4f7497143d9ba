"""The classes of a flat set of validation images, from a text file: by name, or a label a line in the names' order."""

from __future__ import annotations

import codecs
import collections
import os
from collections.abc import Collection, Mapping

import numpy as np

from pipeline.sources.file_table import Classes, FileTable
from pipeline.sources.files import SourceError, is_image_name, read_bytes
from pipeline.sources.keys import MAX_DIGITS
from pipeline.storage.locations import shown

_FORMS = "give one class name, or one of the devkit's ids, a line, or 'name class' rows"
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def by_label(
    root: str, files: FileTable, labels: str, synsets: str | None, classes: Collection[str]
) -> tuple[Classes, list[str]]:
    """Puts the images of ROOT into classes, and says what a person should know of how that was done.

    Args:
        files: sorted by name.
        labels: a class name or one of the devkit's ids a line, the i-th of them for the i-th file; or rows of an
            image's name and its class, as Kaggle's LOC_val_solution.csv and Caffe's val.txt have.
        synsets: "id wnid" a line, for labels that are ids.
        classes: the names that there are.

    Raises:
        SourceError: if an image has no label, a label is of no class, or the order of the images is open to doubt.
        OSError: if a file cannot be read.
    """
    lines = _lines(labels, "--val-labels")
    where = shown(labels)
    known = set(classes)
    notes = []
    named = None if known.issuperset(lines) else _rows(lines, known, where)
    given = lines if named is None else list(named.values())
    if not known.issuperset(given):
        wnids: Mapping[int, str] | None = None if synsets is None else _read_synsets(synsets)
        if wnids is None and named is not None and _count_from_zero(given, len(known)):
            wnids = dict(enumerate(sorted(known)))
            notes.append(f"{where} numbers the classes from 0 on: taken in the order of their sorted names")
        given = _resolved(given, "line" if named is None else "row", where, known, wnids, synsets)
    if named is None:
        _check_order(root, files, where, len(given))
        of_each = given
    else:
        table = dict(zip(named, given, strict=True))
        stems = [_stem(name) for name in files.names()]
        missing = [stem for stem in stems if stem not in table]
        if missing:
            raise SourceError(
                f"{where} has no row for {len(missing):,} of the {len(stems):,} images in {shown(root)}, "
                f"the first {missing[0]!r}: give the labels that belong to these images"
            )
        if len(table) > len(stems):
            notes.append(f"{where} names {len(table) - len(stems):,} images that {shown(root)} does not hold")
        of_each = [table[stem] for stem in stems]
    rows = collections.defaultdict(list)
    for row, name in enumerate(of_each):
        rows[name].append(row)
    return {name: files.take(np.array(mine)) for name, mine in rows.items()}, notes


def _check_order(root: str, files: FileTable, labels: str, count: int) -> None:
    """Makes sure that the i-th label can be meant for the i-th image."""
    first = next(files.names())
    if any(len(name) != len(first) for name in files.names()):
        raise SourceError(
            f"{shown(root)} holds {first!r} and names of other lengths, so their order is open to doubt: "
            "number the images with leading zeros, as ILSVRC2012_val_00000001.JPEG is, or give 'name class' rows"
        )
    if count != len(files):
        raise SourceError(
            f"{labels} has {count:,} labels and {shown(root)} {len(files):,} images: "
            "give one label a line, in the order of the images' names"
        )


def _rows(lines: list[str], known: Collection[str], where: str) -> dict[str, str] | None:
    """Labels by the stems of the images' names; None where lines are labels alone."""
    parted = [_parted(line, known) for line in lines]
    # Kaggle's table has a heading.
    if len(parted) > 1 and parted[0] is not None and parted[0][1] not in known and not _is_number(parted[0][1]):
        parted, lines = parted[1:], lines[1:]
    rows: dict[str, str] = {}
    for line, row in zip(lines, parted, strict=True):
        if row is None:
            return None
        if rows.setdefault(*row) != row[1]:
            raise SourceError(
                f"{where} gives {row[0]!r} two labels, {rows[row[0]]!r} and {line!r}: list each image once"
            )
    return rows


def _parted(line: str, known: Collection[str]) -> tuple[str, str] | None:
    """An image's stem and its label; what follows the label, such as boxes, is not read."""
    separator = next((mark for mark in ",\t" if mark in line), None)
    name, _, rest = line.partition(separator or " ")
    label = rest.strip().strip('"').strip()
    if label and label not in known:
        label = label.split()[0].split(",")[0]
    return (_stem(name.strip().strip('"')), label) if name and label else None


def _stem(name: str) -> str:
    base = os.path.basename(name)
    return os.path.splitext(base)[0] if is_image_name(base) else base


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) <= MAX_DIGITS


def _count_from_zero(labels: list[str], classes: int) -> bool:
    """Whether labels are numbers from 0 to the last class, which the devkit's ids, from 1 on, are not."""
    numbers = {int(label) for label in labels if _is_number(label)}
    return all(_is_number(label) for label in labels) and min(numbers) == 0 and max(numbers) == classes - 1


def _resolved(
    labels: list[str],
    line: str,
    where: str,
    known: Collection[str],
    wnids: Mapping[int, str] | None,
    synsets: str | None,
) -> list[str]:
    """The class names of labels, of which some are none themselves."""
    number, odd = next((i, label) for i, label in enumerate(labels, start=1) if label not in known)
    if not all(_is_number(label) for label in labels):
        raise SourceError(f"{line} {number} of {where} is {odd[:60]!r}, which is no class of --source: {_FORMS}")
    if wnids is None:
        raise SourceError(
            f"{where} holds numbers: the devkit counts classes in an order of its own, not by wnid, so give "
            "--val-synsets a text file with 'id wnid' a line"
        )
    names = "the sorted classes" if synsets is None else shown(synsets)
    for number, label in enumerate(labels, start=1):
        wnid = wnids.get(int(label))
        if wnid is None:
            raise SourceError(f"{line} {number} of {where} is {label}, which {names} does not list: give the devkit's")
        if wnid not in known:
            raise SourceError(
                f"{line} {number} of {where} is {label}, which {names} calls {wnid!r}: --source has no such class"
            )
    return [wnids[int(label)] for label in labels]


def _read_synsets(path: str) -> dict[int, str]:
    wnids: dict[int, str] = {}
    lines = _lines(path, "--val-synsets")
    path = shown(path)
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if len(fields) < 2 or not _is_number(fields[0]):
            raise SourceError(f"line {number} of {path} is {line[:60]!r}: give 'id wnid' a line, as '1 n02119789'")
        if int(fields[0]) in wnids:
            raise SourceError(f"line {number} of {path} gives the id {fields[0]} again: list each id once")
        wnids[int(fields[0])] = fields[1]
    return wnids


def _lines(path: str, flag: str) -> list[str]:
    """A text file's lines, stripped; empty ones at its end are none. UTF-8, or what a byte-order mark says."""
    try:
        data = read_bytes(path, None, 0)
        encoding = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), "utf-8")
        text = data.decode(encoding)
    except FileNotFoundError:
        raise SourceError(f"{shown(path)} does not exist: give {flag} a text file") from None
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise SourceError(f"{shown(path)} is no text in UTF-8: give {flag} a text file (not the devkit's meta.mat)")
    return [line.strip() for line in text.rstrip().splitlines()]
