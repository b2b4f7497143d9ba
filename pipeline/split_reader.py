"""Every image of a split one read away.

Opening a split opens every shard and reads its index, labels and checksums; an image is read, and checked, when a
decoder asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.annotation import ShardError
from pipeline.dataset import (
    DatasetError,
    DatasetInfo,
    ImageError,
    ShardRow,
    image_and_label,
    mend_advice,
    read_index,
)
from pipeline.keys import may_be_of
from pipeline.shard_file import ChangedError, DamagedError, ShardFile, read_checksums


class SplitReader:
    """One split's images, its shards open.

    `labels` is int64 [samples]; `image(i)` is the JPEG bytes of sample i; `unchecked` counts the shards whose images
    cannot be checked, as their annotations are missing or have no checksums.

    Args:
        opening: called before each shard is opened, which may take seconds where the disk is slow.

    Raises:
        DatasetError: if a shard is missing or its size, index, labels or annotation do not match `dataset.json`.
        OSError: if more shards are to be opened than the system lets a process open.
    """

    def __init__(self, root: Path, info: DatasetInfo, split: str, opening: Callable[[], None] = lambda: None) -> None:
        if split not in info.splits:
            raise DatasetError(f"the shard set {root} has no {split} split")
        self.split = split
        self._root, self._annotated = root, info.annotated
        self._rows = info.splits[split].shards
        opened = []
        for row in self._rows:
            opening()
            opened.append(_open_shard(root / split, row, info))
        self._files, self._checksums = [file for file, _, _ in opened], [checksums for _, _, checksums in opened]
        self._shard = np.repeat(np.arange(len(opened), dtype=np.int32), [row.samples for row in self._rows])
        samples = [sample for _, samples, _ in opened for sample in samples]
        numbers = np.array([numbers for *numbers, _ in samples], np.int64).reshape(-1, 3)
        self.labels, self._offsets, self._sizes = np.ascontiguousarray(numbers.T)
        self._names = [name for *_, name in samples]
        self._first = np.cumsum([0, *(row.samples for row in self._rows)])
        self.unchecked = sum(checksums is None for checksums in self._checksums)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, sample: int) -> NDArray[np.uint8]:
        """The JPEG bytes of one sample, uint8 [size], checked against its annotation.

        Raises:
            ImageError: if these bytes cannot be read, or are not those that were written.
            DatasetError: if its shard was cut or written to since it was opened.
        """
        number = self._shard[sample]
        checksums = self._checksums[number]
        crc32 = None if checksums is None else int(checksums[sample - self._first[number]])
        try:
            data = self._files[number].read(int(self._offsets[sample]), int(self._sizes[sample]), crc32)
        except ChangedError as error:
            raise DatasetError(self.describe(sample, f"the shard {error}")) from error
        except DamagedError as error:
            shard, key = self._rows[number].name, self.key(sample)
            raise ImageError(self.describe(sample, f"it {error}"), int(sample), shard, key, str(error)) from error
        return np.frombuffer(data, np.uint8)

    def key(self, sample: int) -> str:
        """A sample's file name in its shard, less its extension."""
        return self._names[sample].rpartition(".")[0]

    def describe(self, sample: int, what: str) -> str:
        """One line on what is wrong with a sample (a clause), where it is, and what to do."""
        shard = self._rows[self._shard[sample]].name
        advice = mend_advice(self._root, self.split, shard, self._annotated)
        return f"{self.split} image {self.key(sample)} of {shard}: {what}; {advice}"


def _open_shard(
    folder: Path, row: ShardRow, info: DatasetInfo
) -> tuple[ShardFile, list[tuple[int, int, int, str]], NDArray[np.uint32] | None]:
    """One shard, its samples as (label, offset, size, file name), and their checksums."""
    path = folder / f"{row.name}.tar"
    advice = mend_advice(folder.parent, folder.name, row.name, info.annotated)
    try:
        file = ShardFile(path)
        if file.size != row.bytes:
            raise DatasetError(f"{path} has {file.size} bytes, dataset.json says {row.bytes}")
        index = read_index(path.with_suffix(".idx"))
        if len(index) != row.samples:
            raise DatasetError(
                f"{path.with_suffix('.idx')} lists {len(index)} samples, dataset.json says {row.samples}"
            )
        checksums = read_checksums(path.with_suffix(".json"), row.sha256, row.samples)
    except FileNotFoundError as error:
        raise DatasetError(f"{error.filename} is missing: {advice}") from None
    except (DatasetError, ShardError) as error:
        raise DatasetError(f"{error}: {advice}") from error
    samples = []
    for components in index:
        parts = image_and_label(components)
        if parts is None:
            raise DatasetError(f"{path}: a sample has {sorted(components)}, not jpg and cls: {advice}")
        (offset, length, name), (at, digits, _) = parts
        if max(offset + length, at + digits) > file.size:
            raise DatasetError(f"{path}: sample {name} lies beyond the end of the file: {advice}")
        try:
            text = file.read(at, digits).strip()
        except (DamagedError, ChangedError) as error:
            raise DatasetError(f"{path}: the label of sample {name} {error}: {advice}") from error
        if not text.isdigit() or int(text) >= len(info.classes):
            raise DatasetError(f"{path}: sample {name} has the label {text!r} of {len(info.classes)} classes: {advice}")
        # One bit makes a digit another digit, but keys begin with their class.
        if not info.annotated and not may_be_of(info.classes[int(text)].wnid, name):
            raise DatasetError(f"{path}: sample {name} has the label {int(text)}, which is of another class: {advice}")
        samples.append((int(text), offset, length, name))
    return file, samples, checksums
