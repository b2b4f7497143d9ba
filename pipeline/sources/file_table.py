"""Files in columns, which take a fraction of what objects would; made into objects when asked for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.sources.files import File, FileState
from pipeline.storage.locations import child

BLOCK = 4096  # Rows made into Python objects at a time.
_OF_ITS_OWN = -1  # The offset of what lies in no tar.

Rows = NDArray[np.int64]


class Holder(NamedTuple):
    """What files lie in."""

    path: str
    """Absolute path or URL of a folder, or of a tar."""
    inside: str = ""
    """What its members' names begin with, as the name of a class tar in the tar of all."""
    state: FileState | None = None
    """Of a tar on a disk, when it was listed."""


@dataclasses.dataclass(frozen=True, eq=False)
class FileTable:
    """Some files, in an order: each column has a row a file."""

    holders: tuple[Holder, ...]
    _holder: NDArray[np.int32]
    """Which of the holders each file lies in."""
    _names: pa.LargeBinaryArray
    _sizes: NDArray[np.int64]
    _offsets: NDArray[np.int64]

    @classmethod
    def of(
        cls, holder: Holder, names: Sequence[str], sizes: Sequence[int], offsets: Sequence[int] | None = None
    ) -> FileTable:
        """The files of one holder.

        Args:
            offsets: where each begins in the tar; None for a folder's.
        """
        count = len(names)
        return cls(
            (holder,),
            np.zeros(count, np.int32),
            _encoded(names),
            np.array(sizes, np.int64),
            np.full(count, _OF_ITS_OWN) if offsets is None else np.array(offsets, np.int64),
        )

    @classmethod
    def joined(cls, tables: Sequence[FileTable]) -> FileTable:
        """The files of all tables, one table's after the other's."""
        places: dict[Holder, int] = {}
        holder = []
        for table in tables:
            mine = np.array([places.setdefault(one, len(places)) for one in table.holders], np.int32)
            holder.append(mine[table._holder])
        return cls(
            tuple(places),
            np.concatenate([np.zeros(0, np.int32), *holder]),
            pa.concat_arrays([_encoded([]), *(table._names for table in tables)]),
            np.concatenate([np.zeros(0, np.int64), *(table._sizes for table in tables)]),
            np.concatenate([np.zeros(0, np.int64), *(table._offsets for table in tables)]),
        )

    @classmethod
    def from_arrow(cls, holders: Sequence[Holder], rows: pa.RecordBatch) -> FileTable:
        """The table of which `holders` and `to_arrow` are these."""
        return cls(tuple(holders), rows[0].to_numpy(), rows[1], rows[2].to_numpy(), rows[3].to_numpy())

    def to_arrow(self, labels: NDArray[np.int32]) -> pa.RecordBatch:
        """A row a file: the number of its holder, its name, size and offset, and a label that is given."""
        columns = [_numbers(column) for column in (self._holder, self._sizes, self._offsets, labels)]
        columns.insert(1, self._names)
        return pa.RecordBatch.from_arrays(columns, ["holder", "name", "size", "offset", "label"])

    def __len__(self) -> int:
        return len(self._sizes)

    def at(self, rows: Rows) -> Iterator[File]:
        """The files of some rows."""
        for start in range(0, len(rows), BLOCK):
            block = rows[start : start + BLOCK]
            columns = (self._holder[block], self._sizes[block], self._offsets[block])
            for name, holder, size, offset in zip(
                _decoded(self._names.take(_numbers(block))), *(column.tolist() for column in columns), strict=True
            ):
                path, inside, _ = self.holders[holder]
                if offset == _OF_ITS_OWN:
                    yield File(child(path, name), size)
                else:
                    yield File(path, size, offset, inside + name)

    def states(self, rows: Rows) -> dict[str, FileState]:
        """The tars on a disk that hold some rows, each as it was when it was listed."""
        holders = (self.holders[i] for i in np.unique(self._holder[rows]))
        return {holder.path: holder.state for holder in holders if holder.state is not None}

    def names(self, rows: Rows | None = None) -> Iterator[str]:
        """The files' own names, without folders; of some rows or all."""
        names = self._names if rows is None else self._names.take(_numbers(rows))
        for start in range(0, len(names), BLOCK):
            for name in _decoded(names.slice(start, BLOCK)):
                yield os.path.basename(name)

    def take(self, rows: Rows) -> FileTable:
        """A table of these rows alone, and of no more holders than they need."""
        used, holder = np.unique(self._holder[rows], return_inverse=True)
        return FileTable(
            tuple(self.holders[i] for i in used),
            holder.astype(np.int32),
            self._names.take(_numbers(rows)),
            self._sizes[rows],
            self._offsets[rows],
        )


Classes = Mapping[str, FileTable]
"""The images of each class, in the order of their names."""


# Arrow's arrays are made of their buffers here: `pa.array` imports pandas, which takes each process half a second.


def _encoded(names: Sequence[str]) -> pa.LargeBinaryArray:
    values = [name.encode("utf-8", "surrogateescape") for name in names]
    ends = np.cumsum([0, *map(len, values)], dtype=np.int64)
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(values))]
    return pa.Array.from_buffers(pa.large_binary(), len(values), buffers)


def _numbers(values: NDArray[Any]) -> pa.Array:
    kind = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def _decoded(names: pa.LargeBinaryArray) -> list[str]:
    return [name.decode("utf-8", "surrogateescape") for name in names.to_pylist()]
