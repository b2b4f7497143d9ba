"""Another WebDataset as a source: tars of KEY.jpg and KEY.cls, read in place by the offsets of their members."""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.sources.file_table import Classes, FileTable
from pipeline.sources.files import IMAGE_EXTENSIONS, SourceError, read_bytes
from pipeline.sources.keys import LABEL_COMPONENT, label_number, split_name
from pipeline.sources.names import is_wnid, wnid_in
from pipeline.sources.tars import Member, Stretch, Window, table_of
from pipeline.storage.locations import join, parent, shown

_CURE = "give shards with an image and its .cls in each sample"
_MAX_LABEL_BYTES = 64
_MAX_JSON_BYTES = 2**20
_CLASS_FIELDS = ("wnid", "synset", "class_name", "label_name")  # Of a sample's .json
_PATH_FIELDS = ("filename", "file_name", "path")

Names = Mapping[int, str]
"""What each label is called."""


class Samples(NamedTuple):
    """A shard's samples."""

    where: str
    files: FileTable
    """Their images."""
    labels: NDArray[np.int64]
    """Of each."""
    named: frozenset[tuple[int, str]]
    """Each label with the class names that its samples' keys or .json give."""
    others: Mapping[str, int]
    """How many files are neither image nor label, by extension."""


class SampleReader:
    """Collects the samples of a tar while its members are read in order."""

    def __init__(self, tar: Stretch) -> None:
        self._tar = tar
        self._labels: dict[str, bytes] = {}
        self._names: dict[str, str] = {}

    @property
    def found(self) -> bool:
        """Whether the tar is a shard."""
        return bool(self._labels)

    def add(self, member: Member, file: Window) -> None:
        """Reads a member where it is a label or says what its sample's class is called."""
        key, extension = _parts(member)
        if extension == LABEL_COMPONENT:
            if key in self._labels:
                raise SourceError(f"{self._tar.where} holds two labels of the sample {key!r}: {_CURE}")
            if member.size > _MAX_LABEL_BYTES:
                raise SourceError(
                    f"{self._tar.where}: {member.name!r} has {member.size:,} bytes: a label is a number from 0 on"
                )
            self._labels[key] = file.contents(member)
        elif extension.endswith(f".{LABEL_COMPONENT}"):
            raise SourceError(
                f"{self._tar.where} holds {member.name!r}: in a WebDataset the first dot of a file's name ends the "
                f"sample's key, here {key!r}; write the shards again with keys without dots"
            )
        elif extension == "json" and member.size <= _MAX_JSON_BYTES and wnid_in(f"{os.path.basename(key)}.jpg") is None:
            name = _name_in_json(file.contents(member))
            if name is not None:
                self._names[key] = name

    def read(self, members: Iterable[Member]) -> Samples:
        """The samples of all members of the tar.

        Raises:
            SourceError: for a sample without an image or a label, or with two images, or whose label is no number.
        """
        where = self._tar.where
        images: dict[str, Member] = {}
        others: collections.Counter[str] = collections.Counter()
        for member in members:
            key, extension = _parts(member)
            if f".{extension}" in IMAGE_EXTENSIONS:
                if key in images:
                    raise SourceError(f"{where} holds two images of the sample {key!r}: {_CURE}")
                images[key] = member
            elif extension != LABEL_COMPONENT:
                others[f".{extension}"] += 1
        for key in images.keys() ^ self._labels.keys():
            has, lacks = (
                ("an image", f"no .{LABEL_COMPONENT}") if key in images else (f"a .{LABEL_COMPONENT}", "no image")
            )
            raise SourceError(f"{where}: the sample {key!r} has {has} and {lacks}: {_CURE}")
        labels = np.zeros(len(images), np.int64)
        named = set()
        for i, key in enumerate(images):
            number = label_number(self._labels[key])
            if number is None:
                text = self._labels[key].strip()[:40]
                raise SourceError(f"{where}: the sample {key!r} has the label {text!r}: a label is a number from 0 on")
            labels[i] = number
            folder, _, base = key.rpartition("/")
            name = wnid_in(f"{base}.jpg") or self._names.get(key) or os.path.basename(folder)
            if name:
                named.add((number, name))
        return Samples(where, table_of(self._tar, list(images.values())), labels, frozenset(named), others)


def _parts(member: Member) -> tuple[str, str]:
    key, extension = split_name(member.name)
    return key, extension.lower()


def _name_in_json(data: bytes) -> str | None:
    """What a sample's .json calls its class: by a field, or by the folder in its file's path."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    for field in _CLASS_FIELDS:
        if isinstance(name := fields.get(field), str):
            return name
    for field in _PATH_FIELDS:
        if isinstance(path := fields.get(field), str):
            folder, _, base = path.replace("\\", "/").rpartition("/")
            return wnid_in(base) or os.path.basename(folder)
    return None


def names_beside(folder: str) -> Names | None:
    """The class names that a `dataset.json` in the folder of some shards, or in the one above, gives, by label.

    Raises:
        SourceError: if there is one and it cannot be understood.
        OSError: if it cannot be read.
    """
    for location in (join(folder, "dataset.json"), join(parent(folder), "dataset.json")):
        try:
            text = read_bytes(location, None, 0)
        # A server on the web may forbid what it does not have.
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        try:
            names = [str(label["wnid"]) for label in json.loads(text)["classes"]]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise SourceError(
                f"{shown(location)} does not list classes by their wnid: remove it to name the classes by their labels"
            ) from error
        if len(set(names)) < len(names):
            raise SourceError(f"{shown(location)} gives two classes one wnid: name the classes apart")
        return dict(enumerate(names))
    return None


def names_by_samples(shards: Sequence[Samples]) -> Names | None:
    """What the samples themselves call each label; None where some label has no name or two have the same.

    Raises:
        SourceError: if samples of one wnid have two labels.
    """
    labels = {int(label) for shard in shards for label in np.unique(shard.labels)}
    pairs = sorted({pair for shard in shards for pair in shard.named})
    by_name: dict[str, int] = {}
    for label, name in pairs:
        if by_name.setdefault(name, label) != label and is_wnid(name):
            raise SourceError(
                f"{shards[0].where} and the shards beside it give {name} the labels {by_name[name]} and {label}: "
                "give shards of one set, which number the classes alike"
            )
    names = {label: name for name, label in by_name.items()}
    return names if len(pairs) == len(names) == len(by_name) and names.keys() == labels else None


def by_class(where: str, shards: Sequence[Samples], names: Names | None) -> tuple[Classes, Names]:
    """The images of some shards by class, and what their labels are called.

    Args:
        where: the folder or pattern, for people.
        names: None for class_0000, class_0001, ..., which must be without a gap then.

    Raises:
        SourceError: for a label without a name, a name that the samples contradict, or a gap.
    """
    table = FileTable.joined([shard.files for shard in shards])
    of_each = np.concatenate([shard.labels for shard in shards])
    labels = np.unique(of_each)
    last = int(labels[-1])
    if names is None:
        missing = last + 1 - len(labels)
        if missing:
            first = np.flatnonzero(labels != np.arange(len(labels)))[0]
            raise SourceError(
                f"{where} has labels up to {last} and none of {first} ({missing} are missing): "
                "number the classes from 0 without a gap"
            )
        digits = max(4, len(str(last)))
        names = {label: f"class_{label:0{digits}d}" for label in range(last + 1)}
    unknown = [label for label in labels.tolist() if label not in names]
    if unknown:
        raise SourceError(
            f"{where} has the label {unknown[-1]}, which is none of its {len(names)} classes: "
            "give shards and the dataset.json or training shards that belong to them"
        )
    known = set(names.values())
    for shard in shards:
        for label, name in shard.named:
            # The folder in a key may be that of a class, and may be of anything else.
            if name != names[label] and (name in known or (is_wnid(name) and is_wnid(names[label]))):
                raise SourceError(
                    f"{shard.where} gives {name} the label {label}, which elsewhere is {names[label]}: "
                    "give training and validation shards, and a dataset.json, that number the classes alike"
                )
    order = np.argsort(of_each, kind="stable")
    starts = np.searchsorted(of_each[order], labels)
    rows = zip(labels.tolist(), np.split(order, starts[1:]), strict=True)
    return {names[label]: table.take(mine) for label, mine in rows}, names
