"""The images of one split, read a batch at a time and checked: JPEGs from the tars, or pixels from a decoded cache.

Opening a split maps its sample index and opens every shard. Nothing is parsed, whatever the number of images.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.dataset.info import DatasetError, DatasetInfo, is_decoded, repair_advice
from pipeline.dataset.sample_index import open_index
from pipeline.dataset.shard_file import DamagedError, ShardFile, allow_open_files
from pipeline.images.decode import IMAGE_BYTES, IMAGE_SHAPE, MAX_JPEG_BYTES, ImageError, decode_stored

END_OF_IMAGE = b"\xff\xd9"

Allocate = Callable[[tuple[int, int]], NDArray[np.uint8]]
"""(rows, bytes a row) -> memory for them, whose contents do not matter."""


def _plain_memory(shape: tuple[int, int]) -> NDArray[np.uint8]:
    return np.empty(shape, np.uint8)


class SplitReader:
    """One split's images, its shards open.

    `index` is the sample index. `pixels` tells whether images come decoded.

    Args:
        root: a shard set on a disk, or a decoded cache of one.

    Raises:
        DatasetError: if the index or a shard is missing or is not what `dataset.json` says.
        OSError: if more shards are to be opened than the system lets a process open.
    """

    def __init__(self, root: Path, info: DatasetInfo, split: str) -> None:
        if split not in info.splits:
            raise DatasetError(f"the shard set {root} has no {split} split")
        self.split = split
        self.pixels = is_decoded(root)
        self._root = root
        self._info = info.splits[split]
        self._classes = len(info.classes)
        self._open_index()
        allow_open_files(len(self._info.shards))
        self._files = []
        for row in self._info.shards:
            path = f"{root}/{split}/{row.name}{'.rgb' if self.pixels else '.tar'}"
            try:
                file = ShardFile(path)
            except FileNotFoundError:
                raise DatasetError(f"{path} is missing: {self._advice(row.name)}") from None
            wanted = row.samples * IMAGE_BYTES if self.pixels else row.bytes
            if file.size != wanted:
                raise DatasetError(
                    f"{path} has {file.size} bytes, dataset.json says {wanted}: {self._advice(row.name)}"
                )
            self._files.append(file)

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        """For a process that inherits `descriptors`: it reads the files that were opened here."""
        return {name: value for name, value in vars(self).items() if name != "index"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open_index()

    @property
    def labels(self) -> NDArray[np.int32]:
        """[samples]"""
        return self.index.labels

    @property
    def row_bytes(self) -> int:
        """The most that `read` returns of an image. Not known before it is asked for: it takes a look at all sizes."""
        if self.pixels:
            return IMAGE_BYTES
        return min(int(self.index.sizes.max(initial=0)), MAX_JPEG_BYTES) + len(END_OF_IMAGE)

    @property
    def descriptors(self) -> list[int]:
        """Of the open shards."""
        return [file.descriptor for file in self._files]

    def _open_index(self) -> None:
        self.index = open_index(self._root, self.split, self._info, self._classes)

    def read(self, samples: NDArray[np.int64], allocate: Allocate = _plain_memory) -> NDArray[np.uint8]:
        """The images of some samples, each checked against the index.

        Args:
            samples: int64 [n].

        Returns:
            uint8 [n, 256, 256, 3] of pixels, or [n, longest + 2] of JPEGs, each from its row's beginning. What follows
            a JPEG in its row is an end-of-image marker, and then anything.

        Raises:
            DatasetError: if an image cannot be read or is not what was written; it names the sample.
        """
        index = self.index
        sizes = index.sizes[samples]
        longest = int(sizes.max(initial=0))
        if longest > MAX_JPEG_BYTES or (self.pixels and (sizes != IMAGE_BYTES).any()):
            odd = int(samples[(sizes != IMAGE_BYTES if self.pixels else sizes > MAX_JPEG_BYTES).argmax()])
            raise DatasetError(self.describe(odd, f"the sample index gives it {index.sizes[odd]:,} bytes"))
        width = IMAGE_BYTES if self.pixels else longest + len(END_OF_IMAGE)
        rows = allocate((len(samples), width))
        room = memoryview(rows.reshape(-1).data)
        # Each line of this loop runs once an image: it holds no numpy call.
        shards, offsets, checksums = (part[samples].tolist() for part in (index.shards, index.offsets, index.checksums))
        for row, (shard, offset, size, crc32) in enumerate(
            zip(shards, offsets, sizes.tolist(), checksums, strict=True)
        ):
            start = row * width
            try:
                self._files[shard].read_into(room[start : start + size], offset, None if self.pixels else crc32)
            except DamagedError as error:
                raise DatasetError(self.describe(int(samples[row]), f"it {error}")) from error
        if self.pixels:
            return rows.reshape(-1, *IMAGE_SHAPE)
        # A JPEG without its end marker would otherwise be decoded on into whatever the memory held.
        order, ends = np.arange(len(samples)), sizes.astype(np.int64)
        for place, value in enumerate(END_OF_IMAGE):
            rows[order, ends + place] = value
        return rows

    def image(self, sample: int) -> NDArray[np.uint8]:
        """One sample: its JPEG's bytes, uint8 [size], or its pixels, uint8 [256, 256, 3].

        Raises:
            DatasetError: as `read`.
        """
        (row,) = self.read(np.array([sample]))
        return row if self.pixels else row[: self.index.sizes[sample]]

    def decoded(self, sample: int) -> NDArray[np.uint8]:
        """One sample's pixels, uint8 [256, 256, 3], for showing it.

        Raises:
            DatasetError: as `read`, or if it does not decode.
        """
        image = self.image(sample)
        if self.pixels:
            return image
        try:
            return decode_stored(image.tobytes())
        except ImageError as error:
            raise DatasetError(self.describe(sample, str(error))) from error

    def key(self, sample: int) -> str:
        """A sample's key in its tar."""
        try:
            return self.index.key(sample)
        except (pa.ArrowException, UnicodeDecodeError):
            return f"no. {int(sample)}"

    def describe(self, sample: int, what: str) -> str:
        """One line on what is wrong with a sample (a clause), where it is, and what to do."""
        shard = self._info.shards[self.index.shards[sample]].name
        return f"{self.split} image {self.key(sample)} of {shard}: {what}; {self._advice(shard)}"

    def _advice(self, shard: str) -> str:
        return repair_advice(self._root, self.split, shard)
