"""A shard's index, as arrays: where each sample's image and label lie in the tar, and what the image's file is called.

DALI's format: a line `v1.2 SAMPLES`, then a line a sample, `EXTENSION OFFSET SIZE NAME` of each of its parts. No Python
object is made of any sample: a rank opens every index of its set.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.dataset import IMAGE_COMPONENTS, INDEX_VERSION, LABEL_COMPONENT, DatasetError

FIELDS = 4  # Of a sample's part: extension, offset, size, name.
MAX_DIGITS = 18  # Of a number, so that it fits an int64.


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard, in the tar's order."""

    images: NDArray[np.int64]
    """[samples, 2]: offset and size of each JPEG in the tar."""
    labels: NDArray[np.int64]
    """[samples, 2]: the same of each label's text."""
    text: bytes
    """The index itself, ending in a line break."""
    names: NDArray[np.int64]
    """[samples, 2]: where each JPEG's file name begins and ends in the text."""

    def __len__(self) -> int:
        return len(self.images)

    def name(self, sample: int) -> str:
        """The file name of a sample's JPEG in the tar."""
        start, end = self.names[sample].tolist()
        return self.text[start:end].decode(errors="replace")

    def key(self, sample: int) -> str:
        """The same without its extension."""
        return self.name(sample).rpartition(".")[0]

    def begin_with(self, beginnings: NDArray[np.bytes_]) -> NDArray[np.bool_]:
        """Whether each JPEG's file name begins with what is given for it, bytes [samples]; bool [samples]."""
        wanted = beginnings.view(np.uint8).reshape(len(self), beginnings.itemsize)
        places = self.names[:, :1] + np.arange(wanted.shape[1])
        # Past the end there is only the last line's break, which no beginning holds; after a beginning, zeros.
        found = np.frombuffer(self.text, np.uint8)[np.minimum(places, len(self.text) - 1)]
        return ((found == wanted) | (wanted == 0)).all(axis=1)

    def refuse_beyond(self, size: int, where: str) -> None:
        """Raises DatasetError, naming the tar `where` of `size` bytes, if samples lie beyond its end or in each other.

        Else an index of small numbers could have a tar's bytes read for every sample again.
        """
        beyond = np.maximum(self.images.sum(axis=1), self.labels.sum(axis=1)) > size
        if beyond.any():
            raise DatasetError(f"{where}: sample {self.name(beyond.argmax())} lies beyond the end of the file")
        if self.images[:, 1].sum() + self.labels[:, 1].sum() > size:
            raise DatasetError(f"{where}: by its index the samples have more bytes than the file")


def read_index(path: Path) -> ShardIndex:
    """Reads a shard's index.

    Raises:
        DatasetError: as `parse_index`.
        OSError: if it cannot be read.
    """
    return parse_index(path.read_bytes(), str(path))


def parse_index(text: bytes, where: str) -> ShardIndex:
    """Parses the contents of an index.

    Raises:
        DatasetError: naming `where`, if it is no "v1.2" index, is not whole, or a sample lacks its image or its label.
    """
    text = text if text.endswith(b"\n") else text + b"\n"
    header = text[: text.index(b"\n")]
    data = np.frombuffer(text, np.uint8)
    ends = np.flatnonzero((data == ord(" ")) | (data == ord("\n")))
    breaks = data[ends] == ord("\n")
    # The header's fields have done their part.
    after = int(breaks.argmax()) + 1
    starts, ends, breaks = ends[after - 1 : -1] + 1, ends[after:], breaks[after:]
    count = int(breaks.sum())
    if header.split() != [INDEX_VERSION.encode(), str(count).encode()]:
        raise DatasetError(f"{where} is no whole {INDEX_VERSION} index: its first line is {header[:40]!r}")
    line = np.cumsum(breaks) - breaks
    wrong = np.bincount(line, minlength=count) % FIELDS != 0
    if wrong.any():
        raise DatasetError(f"{where} is damaged: its line {wrong.argmax() + 2} has fields too many or too few")
    sample = line[::FIELDS]
    first, last = starts.reshape(-1, FIELDS), ends.reshape(-1, FIELDS)
    numbers, right = _numbers(data, first[:, 1:3], last[:, 1:3])
    if not right.all():
        raise DatasetError(f"{where} is damaged: its line {sample[right.argmin()] + 2} has no numbers where it should")

    codes = _codes(data, first[:, 0], last[:, 0])

    def parts(*extensions: str) -> NDArray[np.int64]:
        """The part of each sample that has the first of these extensions that it has; of equal ones the last."""
        found = np.full(count, -1)
        for extension in reversed(extensions):
            mine = np.flatnonzero(codes == _code(extension))
            found[sample[mine]] = mine
        return found

    images, labels = parts(*IMAGE_COMPONENTS), parts(LABEL_COMPONENT)
    lacking = np.minimum(images, labels) < 0
    if lacking.any():
        bad = sample == lacking.argmax()
        there = sorted(text[a:b].decode(errors="replace") for a, b in zip(first[bad, 0], last[bad, 0], strict=True))
        raise DatasetError(f"{where}: sample {lacking.argmax() + 1} has {there}, not jpg and cls")
    names = np.stack([first[images, 3], last[images, 3]], axis=1)
    return ShardIndex(numbers[images], numbers[labels], text, names)


def _numbers(
    data: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The numbers that some fields hold, [parts, fields], and whether all of a part's are numbers, [parts]."""
    lengths = ends - starts
    right: NDArray[np.bool_] = (lengths > 0) & (lengths <= MAX_DIGITS)
    values = np.zeros_like(lengths)
    for place in range(min(int(lengths.max(initial=0)), MAX_DIGITS)):
        # From the last digit on; before the first of a shorter number lies nothing of it.
        there = lengths > place
        digits = np.where(there, data[ends - 1 - place] - np.uint8(ord("0")), np.uint8(0))
        right &= digits <= 9
        values += digits * np.int64(10**place)
    return values, np.logical_and.reduce(right, axis=1)


def _codes(data: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.uint32]:
    """A number for each of some extensions, the same for the same letters of either case; 0 for long ones."""
    # A part has four fields and as many separators: so many bytes can be looked at.
    letters = data[starts[:, None] + np.arange(FIELDS)] | np.uint8(ord("a") ^ ord("A"))
    lengths = (ends - starts)[:, None]
    letters *= (np.arange(FIELDS) < lengths) & (lengths <= FIELDS)
    return letters.view(np.uint32)[:, 0]


def _code(extension: str) -> int:
    """The same of an extension that this program knows."""
    assert len(extension) <= FIELDS
    return int.from_bytes(extension.encode().ljust(FIELDS, b"\0"), sys.byteorder)
