"""Another WebDataset as a source: tars of KEY.jpg and KEY.cls, read in place by the offsets of their members."""

from __future__ import annotations

import collections
import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.sources.file_table import Classes, FileTable
from pipeline.sources.files import LISTING_THREADS, SourceError, is_image_name, read_bytes
from pipeline.sources.keys import LABEL_COMPONENT, label_number, split_name
from pipeline.sources.tars import Member, Window, members, members_in, table_of, whole
from pipeline.storage.locations import join, parent, shown

_CURE = "give shards with an image and its .cls in each sample"

Tars = Mapping[str, str]
"""The location of each of some tars, by its name, sorted."""


def contents_of(tar: str) -> tuple[Literal["samples", "images", "others"], str]:
    """What a tar holds, as its first sample tells, and the name of its first file, empty where there is none.

    Samples have parts beside an image; images alone are those of one class, or of none.

    Raises:
        SourceError, OSError: as `members`.
    """
    parts: list[Member] = []
    with contextlib.closing(members(whole(tar))) as found:
        for member in found:
            if member.hidden:
                continue
            if parts and split_name(member.name)[0] != split_name(parts[0].name)[0]:
                break
            parts.append(member)
    if not parts:
        return "others", ""
    images = [is_image_name(member.name) for member in parts]
    if all(images):
        return "images", parts[0].name
    samples = len(parts) > 1 or parts[0].name.lower().endswith(f".{LABEL_COMPONENT}")
    return "samples" if samples else "others", parts[0].name


def prefix(name: str) -> str:
    """A shard's file name without its number: train for train-000123.tar."""
    return os.path.splitext(name)[0].rstrip("0123456789").rstrip("-_.")


def shards_by_split(folder: str, shards: Tars) -> dict[str, Tars]:
    """The shards that lie in one folder, by split, as their names without numbers tell: all are train's where only one
    name is used, or those with "train" and those with "val" in their name.

    Raises:
        SourceError: if the names cannot be told apart, since validation images must not get into the training set.
    """
    groups: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for name, location in shards.items():
        groups[prefix(name)][name] = location
    if len(groups) == 1:
        return {"train": shards}
    train = [name for name in groups if "train" in name]
    val = [name for name in groups if "val" in name and "train" not in name]
    if len(train) == len(val) == 1 and len(groups) == 2:
        return {"train": groups[train[0]], "val": groups[val[0]]}
    raise SourceError(
        f"{shown(folder)} holds shards of {len(groups)} names, {', '.join(sorted(groups)[:4])}: "
        "put those to train on into train/ and those to validate on into val/"
    )


def class_names(shards: Tars) -> tuple[str, ...] | None:
    """The class names that a `dataset.json` beside some shards, or in the folder above, gives, by label; else None.

    Raises:
        SourceError: if there is one and it cannot be understood.
        OSError: if it cannot be read.
    """
    folder = parent(next(iter(shards.values())))
    for location in (join(folder, "dataset.json"), join(parent(folder), "dataset.json")):
        try:
            text = read_bytes(location, None, 0).decode("utf-8")
        # A server on the web may forbid what it does not have.
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        try:
            return tuple(str(label["wnid"]) for label in json.loads(text)["classes"])
        except (ValueError, LookupError, TypeError) as error:
            raise SourceError(
                f"{shown(location)} does not list classes by their wnid: remove it to name the classes by their labels"
            ) from error
    return None


def read_shards(root: str, shards: Tars, names: Sequence[str] | None) -> tuple[Classes, int, tuple[str, ...]]:
    """The images of some shards by class, sorted by name, how many other files there are, and the names by label.

    Args:
        names: what each label is called; None for class_0000, class_0001, ..., which must be without a gap then.

    Raises:
        SourceError: for a sample without image or label, one that is there twice, a label without a name, or a gap.
        OSError: if a shard cannot be read.
    """
    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        listed = list(pool.map(_read_shard, shards.values()))
    table = FileTable.joined([files for files, _, _ in listed])
    of_each = np.concatenate([labels for _, labels, _ in listed])
    others = sum(more for _, _, more in listed)
    if not len(table):
        raise SourceError(f"the {len(shards)} tars in {shown(root)} hold no image: {_CURE}")
    labels = np.unique(of_each)
    last = int(labels[-1])
    if names is None:
        missing = last + 1 - len(labels)
        if missing:
            first = np.flatnonzero(labels != np.arange(len(labels)))[0]
            raise SourceError(
                f"{shown(root)} has labels up to {last} and none of {first} ({missing} are missing): "
                "number the classes from 0 without a gap"
            )
        digits = max(4, len(str(last)))
        names = [f"class_{label:0{digits}d}" for label in range(last + 1)]
    elif last >= len(names):
        raise SourceError(
            f"{shown(root)} has the label {last}, but its classes are {len(names)}, numbered from 0: "
            "give shards and the dataset.json or training shards that belong to them"
        )
    order = np.argsort(of_each, kind="stable")
    starts = np.searchsorted(of_each[order], labels)
    classes = {}
    for label, rows in zip(labels.tolist(), np.split(order, starts[1:]), strict=True):
        keyed = zip(table.names(rows), table.at(rows), rows.tolist(), strict=True)
        by_name = sorted(keyed, key=lambda one: (one[0], one[1].path, one[1].member))
        classes[names[label]] = table.take(np.array([row for _, _, row in by_name]))
    return classes, others, tuple(names)


def _read_shard(path: str) -> tuple[FileTable, NDArray[np.int64], int]:
    """The images of a shard, their labels, and how many files are neither."""
    images: dict[str, Member] = {}
    labels: dict[str, bytes] = {}
    others = 0
    tar = whole(path)
    with contextlib.closing(Window(tar)) as file:
        for member in members_in(file):
            if member.hidden:
                continue
            key, extension = split_name(member.name)
            if is_image_name(f"x.{extension}"):
                what, there = "image", key in images
                images[key] = member
            elif extension.lower() == LABEL_COMPONENT:
                what, there = "label", key in labels
                labels[key] = file.contents(member)
            else:
                others += 1
                continue
            if there:
                raise SourceError(f"{tar.where} holds two {what}s of the sample {key!r}: {_CURE}")
    for key in images.keys() ^ labels.keys():
        has, lacks = ("an image", f"no .{LABEL_COMPONENT}") if key in images else (f"a .{LABEL_COMPONENT}", "no image")
        raise SourceError(f"{tar.where}: the sample {key!r} has {has} and {lacks}: {_CURE}")
    numbers = []
    for key in images:
        number = label_number(labels[key])
        if number is None:
            text = labels[key].strip()[:40]
            raise SourceError(f"{tar.where}: the sample {key!r} has the label {text!r}: a label is a number from 0 on")
        numbers.append(number)
    return table_of(tar, list(images.values())), np.array(numbers, np.int64), others
