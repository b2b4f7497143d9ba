"""Damage done on purpose: to shards, at places found with `tarfile` and not with the project's index, and to disks."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from pipeline.dataset.info import DATASET_FILE, read_dataset
from pipeline.dataset.sample_index import describe_index, pack_index, record_batch
from pipeline.dataset.split_reader import END_OF_IMAGE, Allocate, SplitReader


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one sample's parts lie."""

    tar: Path
    key: str
    image: int
    """Offset of the JPEG in the tar."""
    size: int
    """Of the JPEG."""
    label: int
    """Offset of the label's digits."""

    @property
    def shard(self) -> str:
        return self.tar.stem

    @property
    def jpeg(self) -> bytes:
        return self.tar.read_bytes()[self.image : self.image + self.size]

    @property
    def number(self) -> int:
        """The label of a sample of one of up to ten classes."""
        return int(self.tar.read_bytes()[self.label : self.label + 1])


def places(root: Path, split: str) -> list[Place]:
    """All samples of a split, in the tars' order."""
    found = []
    for path in sorted((root / split).glob("*.tar")):
        with tarfile.open(path) as tar:
            parts = {member.name: member for member in tar.getmembers()}
        for name, image in parts.items():
            key, _, extension = name.rpartition(".")
            if extension == "jpg":
                found.append(Place(path, key, image.offset_data, image.size, parts[f"{key}.cls"].offset_data))
    return found


def own_copy(shard_set: Path, folder: Path) -> Path:
    """A set that may be damaged."""
    return Path(shutil.copytree(shard_set, folder))


def edit_dataset(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads((root / DATASET_FILE).read_text())
    change(value)
    (root / DATASET_FILE).write_text(json.dumps(value))


def write_index(root: Path, shards: Sequence[pa.RecordBatch]) -> None:
    """Writes a sample index of the training split, for which dataset.json vouches, of each shard's rows."""
    index = pack_index(shards)
    (root / "train.arrow").write_bytes(index)
    stated = dataclasses.asdict(describe_index(read_dataset(root).splits["train"], index))
    edit_dataset(root, lambda value: value["splits"].update(train=stated))


def rewrite_index(root: Path, sample: int, **values: object) -> None:
    """Gives a training sample other values in the sample index, for which dataset.json vouches."""
    (batch,) = pa.ipc.open_file(root / "train.arrow").read_all().to_batches()
    columns = {name: batch[name].to_pylist() for name in batch.schema.names}
    per_shard = columns["shard"].count(0)
    for name, value in values.items():
        columns[name][sample] = value
    rows = record_batch(*columns.values())
    write_index(root, [rows.slice(start, per_shard) for start in range(0, len(rows), per_shard)])


def resealed(state: dict[str, Any]) -> str:
    """A checkpoint's changed state with the sha256 that belongs to it."""
    value = {name: part for name, part in state.items() if name != "sha256"}
    return json.dumps(value | {"sha256": hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()})


class OtherImages:
    """A reader's images, but for some that are others, vouched for like the rest.

    Args:
        others: by sample, uint8 [size] each.
    """

    pixels = False

    def __init__(self, reader: SplitReader, others: Mapping[int, NDArray[np.uint8]]) -> None:
        self._reader, self._others = reader, others
        self.labels, self.describe, self.row_bytes = reader.labels, reader.describe, 2**18
        self.descriptors = reader.descriptors

    def read(self, samples: NDArray[np.int64], allocate: Allocate) -> NDArray[np.uint8]:
        images = [self._others.get(sample, self._reader.image(sample)) for sample in samples.tolist()]
        rows = allocate((len(images), max(map(len, images)) + len(END_OF_IMAGE)))
        for row, image in zip(rows, images, strict=True):
            row[: len(image)] = image
            row[len(image) :][: len(END_OF_IMAGE)] = list(END_OF_IMAGE)
        return rows


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own in a new folder, of a size as mount(8) takes it."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"mounting a small disk needs root: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def overwrite(path: Path, offset: int, data: bytes) -> None:
    """Writes into a file where it lies, keeping its size and its inode."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        assert os.pwrite(descriptor, data, offset) == len(data)
    finally:
        os.close(descriptor)


def flip_bit(path: Path, offset: int, bit: int = 0) -> None:
    """What a failing disk or memory does."""
    with path.open("rb") as file:
        file.seek(offset)
        byte = file.read(1)[0]
    overwrite(path, offset, bytes([byte ^ 1 << bit]))


def flip_in_the_middle(place: Place) -> None:
    """A bit of the JPEG's compressed pixels: it decodes, to other pixels."""
    flip_bit(place.tar, place.image + place.size // 2)


def flip_in_the_header(place: Place) -> None:
    """A bit of the JPEG's first marker: nothing decodes it."""
    flip_bit(place.tar, place.image + 1)
