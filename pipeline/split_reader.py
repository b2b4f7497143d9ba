"""Every image of a split one read away.

Opening a split opens every shard and reads its index, labels and checksums; an image is read, and checked, when a
decoder asks for it. What is kept of an image are 16 bytes, or 24 where its shard has 4 GiB and more: its name is read
again when an error has to name it.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.annotation import ShardError
from pipeline.dataset import DatasetError, DatasetInfo, ImageError, ShardRow, mend_advice
from pipeline.keys import beginning
from pipeline.shard_file import ChangedError, DamagedError, ShardFile, allow_open_files, read_checksums
from pipeline.shard_index import MAX_DIGITS, ShardIndex, read_index


class SplitReader:
    """One split's images, its shards open.

    `labels` is int32 [samples]; `image(i)` is the JPEG bytes of sample i; `unchecked` counts the shards whose images
    cannot be checked, as their annotations are missing or have no checksums.

    Args:
        opening: called before each shard is opened, which may take seconds where the disk is slow.

    Raises:
        DatasetError: if a shard is missing or its size, index, labels or annotation do not match `dataset.json`; of
            several, the first.
        OSError: if more shards are to be opened than the system lets a process open.
    """

    def __init__(self, root: Path, info: DatasetInfo, split: str, opening: Callable[[], None] = lambda: None) -> None:
        if split not in info.splits:
            raise DatasetError(f"the shard set {root} has no {split} split")
        self.split = split
        self._root, self._annotated = root, info.annotated
        self._rows = info.splits[split].shards
        self._first = list(itertools.accumulate((row.samples for row in self._rows), initial=0))
        self._files: list[ShardFile] = []
        self._places: list[NDArray[np.unsignedinteger]] = []
        self._checksums: list[NDArray[np.uint32] | None] = []
        # Of each shard when it has been looked at: what dataset.json says of their number is not trusted with memory.
        labels = [np.empty(0, np.int32)]
        classes = Classes(info)
        allow_open_files(len(self._rows))
        for row in self._rows:
            opening()
            try:
                labels.append(self._open(row, classes))
            except FileNotFoundError as error:
                raise DatasetError(f"{error.filename} is missing: {self._advice(row.name)}") from None
            except (DatasetError, ShardError) as error:
                raise DatasetError(f"{error}: {self._advice(row.name)}") from error
        self.labels = np.concatenate(labels)
        self.unchecked = sum(checksums is None for checksums in self._checksums)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, sample: int) -> NDArray[np.uint8]:
        """The JPEG bytes of one sample, uint8 [size], checked against its annotation.

        Raises:
            ImageError: if these bytes cannot be read, or are not those that were written.
            DatasetError: if its shard was cut or written to since it was opened.
        """
        shard, number = place_of(sample, self._first)
        checksums = self._checksums[shard]
        crc32 = None if checksums is None else int(checksums[number])
        offset, size = self._places[shard][number].tolist()
        try:
            data = self._files[shard].read(offset, size, crc32)
        except ChangedError as error:
            raise DatasetError(self.describe(sample, f"the shard {error}")) from error
        except DamagedError as error:
            name, key = self._rows[shard].name, self.key(sample)
            raise ImageError(self.describe(sample, f"it {error}"), int(sample), name, key, str(error)) from error
        return np.frombuffer(data, np.uint8)

    def key(self, sample: int) -> str:
        """A sample's file name in its shard, less its extension, read from the shard's index.

        Where that is gone, or another than when the shard was opened, "no. N": its number in the shard, from 1.
        """
        shard, number = place_of(sample, self._first)
        try:
            index = read_index(self._path(self._rows[shard].name, ".idx"))
        except (OSError, DatasetError):
            index = None
        if index is None or not np.array_equal(index.images, self._places[shard]):
            return f"no. {number + 1}"
        return index.key(number)

    def describe(self, sample: int, what: str) -> str:
        """One line on what is wrong with a sample (a clause), where it is, and what to do."""
        shard = self._rows[place_of(sample, self._first)[0]].name
        return f"{self.split} image {self.key(sample)} of {shard}: {what}; {self._advice(shard)}"

    def _path(self, shard: str, suffix: str) -> Path:
        return self._root / self.split / f"{shard}{suffix}"

    def _advice(self, shard: str) -> str:
        return mend_advice(self._root, self.split, shard, self._annotated)

    def _open(self, row: ShardRow, classes: Classes) -> NDArray[np.int32]:
        """Opens one shard, checks it and returns its labels, [samples]."""
        path = self._path(row.name, ".tar")
        file = ShardFile(path)
        if file.size != row.bytes:
            raise DatasetError(f"{path} has {file.size} bytes, dataset.json says {row.bytes}")
        index = read_index(path.with_suffix(".idx"))
        if len(index) != row.samples:
            raise DatasetError(
                f"{path.with_suffix('.idx')} lists {len(index)} samples, dataset.json says {row.samples}"
            )
        checksums = read_checksums(path.with_suffix(".json"), row.sha256, row.samples)
        index.refuse_beyond(file.size, str(path))
        try:
            labels = classes.labels(file.read_each(index.labels.tolist()), index, str(path))
        except ChangedError as error:
            raise DatasetError(f"{path} {error}") from error
        self._files.append(file)
        # No place in the file is beyond what its size fits.
        self._places.append(index.images.astype(np.uint32 if file.size < 2**32 else np.uint64))
        self._checksums.append(checksums)
        return labels


def place_of(sample: int, first: Sequence[int]) -> tuple[int, int]:
    """Which shard a sample is in, and its number there, from 0.

    Args:
        first: the first sample of each shard, and how many there are in all.
    """
    sample = int(sample)  # A list's search compares Python's numbers ten times as fast as numpy's.
    shard = bisect.bisect_right(first, sample) - 1
    return shard, sample - first[shard]


class Classes:
    """What a label of a set may be."""

    def __init__(self, info: DatasetInfo) -> None:
        self._count = len(info.classes)
        self._by_text = {str(label).encode(): label for label in range(self._count)}
        # Only this program's keys begin with the class.
        beginnings = [beginning(label.wnid).encode() for label in info.classes]
        self._beginnings = None if info.annotated else np.array(beginnings)

    def labels(self, texts: Iterable[bytes], index: ShardIndex, where: str) -> NDArray[np.int32]:
        """A shard's labels, [samples].

        Args:
            texts: what the tar has for each.
            where: the tar, for errors.

        Raises:
            DatasetError: if one cannot be read, is no class of the set, or is of another class than the sample's key.
        """
        found: list[bytes] = []
        try:
            for text in texts:
                found.append(text)
        except DamagedError as error:
            raise DatasetError(f"{where}: the label of sample {index.name(len(found))} {error}") from error
        known = self._by_text
        labels = np.array([known[text] if text in known else self._number(text) for text in found], np.int32)
        if (labels < 0).any():
            bad = int(labels.argmin())
            text = found[bad].strip()
            raise DatasetError(f"{where}: sample {index.name(bad)} has the label {text!r} of {self._count} classes")
        if self._beginnings is not None:
            # One bit makes a digit another digit, but keys begin with their class.
            fitting = index.begin_with(self._beginnings[labels])
            if not fitting.all():
                bad = int(fitting.argmin())
                raise DatasetError(
                    f"{where}: sample {index.name(bad)} has the label {labels[bad]}, which is of another class"
                )
        return labels

    def _number(self, text: bytes) -> int:
        """The label that a text is, as others write them: among white space, or after zeros; -1 where it is none."""
        digits = text.strip()
        number = int(digits) if digits.isdigit() and len(digits) <= MAX_DIGITS else -1
        return number if number < self._count else -1
