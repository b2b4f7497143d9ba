"""What a source holds: every image of it in a fixed order, in columns.

ImageNet's 1,281,167 training images and the plan of their shards keep 177 MB (tests/benchmarks/source_memory.py).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from pipeline.sources.file_table import BLOCK, Classes, FileTable, Rows
from pipeline.sources.files import FileState
from pipeline.sources.keys import key_of, rename_equal
from pipeline.sources.names import names_of
from pipeline.storage.locations import shown


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One image of a source."""

    path: str
    """Absolute path or URL: of its file, or of the tar that holds it."""
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
        return f"{shown(self.path)}/{self.member}" if self.member else shown(self.path)


class Entries(Sequence[Entry]):
    """Entries in an order, kept in columns and made when asked for. Pickled, it holds nothing beyond its own."""

    def __init__(
        self,
        files: FileTable,
        labels: NDArray[np.int32],
        wnids: Mapping[int, str],
        renamed: Mapping[int, str],
        rows: Rows | None = None,
    ) -> None:
        """
        Args:
            labels: of each file.
            wnids: the class name of each label.
            renamed: the keys that are not what `key_of` gives, by file.
            rows: which files are meant; None for all.
        """
        self.files = files
        self.labels = labels
        self._wnids = wnids
        self.renamed = renamed
        self._rows = np.arange(len(files)) if rows is None else rows

    @classmethod
    def of(cls, classes: Sequence[str], files: Classes) -> Entries:
        """All images of a split, by class and name, each with a key of its own.

        Args:
            classes: sorted; a class's place is its label.
        """
        listed = [(label, files[name]) for label, name in enumerate(classes) if name in files]
        table = FileTable.joined([some for _, some in listed])
        labels = np.repeat(np.array([label for label, _ in listed], np.int32), [len(some) for _, some in listed])

        def key(row: int) -> str:
            return key_of(classes[labels[row]], next(table.names(np.array([row]))))

        keys = (key_of(classes[label], name) for label, some in listed for name in some.names())
        return cls(table, labels, dict(enumerate(classes)), rename_equal(keys, len(table), key))

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Entry: ...

    @overload
    def __getitem__(self, index: slice) -> Entries: ...

    def __getitem__(self, index: int | slice) -> Entry | Entries:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        return next(self._at(self._rows[[index]]))

    def __iter__(self) -> Iterator[Entry]:
        for start in range(0, len(self), BLOCK):
            yield from self._at(self._rows[start : start + BLOCK])

    def take(self, places: Rows) -> Entries:
        """The entries at these places, in this order; it shares the columns."""
        return Entries(self.files, self.labels, self._wnids, self.renamed, self._rows[places])

    @property
    def tar_states(self) -> dict[str, FileState]:
        """The tars on a disk that hold these entries, each as it was when it was listed."""
        return self.files.states(self._rows)

    def __reduce__(self) -> tuple[type[Entries], tuple[object, ...]]:
        labels = self.labels[self._rows]
        wnids = {label: self._wnids[label] for label in np.unique(labels).tolist()}
        rows = enumerate(self._rows.tolist())
        renamed = {place: self.renamed[row] for place, row in rows if row in self.renamed}
        return Entries, (self.files.take(self._rows), labels, wnids, renamed)

    def _at(self, rows: Rows) -> Iterator[Entry]:
        names = self.files.names(rows)
        for row, label, file, name in zip(
            rows.tolist(), self.labels[rows].tolist(), self.files.at(rows), names, strict=True
        ):
            wnid = self._wnids[label]
            key = self.renamed.get(row) or key_of(wnid, name)
            yield Entry(file.path, label, wnid, key, file.size, file.offset, file.member)


@dataclasses.dataclass(frozen=True)
class Listing:
    """All images of a source."""

    roots: tuple[str, ...]
    """The folders or tars read, absolute, as `shown`."""
    classes: tuple[str, ...]
    """Sorted: a class's place is its label."""
    splits: dict[str, Entries]
    """train and val, each sorted by class and file name."""
    notes: tuple[str, ...] = ()
    """What a person should know: which files and folders were not read, which classes have no validation image."""

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
