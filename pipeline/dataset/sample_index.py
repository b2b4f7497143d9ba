"""The sample index, SPLIT.arrow: where each image of a split lies, its label and its checksum.

An uncompressed Arrow IPC file, one row a sample in stream order, so that a rank maps it and reads no tar and no text to
open a split of any size. pandas and polars read it too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import tarfile
import zlib
from collections.abc import Sequence
from shlex import quote

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.dataset.info import INDEX_VERSION, DatasetError, Split, staged_from
from pipeline.sources.keys import IMAGE_COMPONENTS, LABEL_COMPONENT, label_number, split_name
from pipeline.sources.tars import fault_of
from pipeline.storage.locations import Location, is_url, join, shown
from pipeline.storage.remote import read

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.uint32(), nullable=False),
        pa.field("offset", pa.uint64(), nullable=False),
        pa.field("size", pa.uint32(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("crc32", pa.uint32(), nullable=False),
    ]
)
_FIELDS = 4  # Of a part of a sample in DALI's text index: extension, offset, size, name.


def index_file(split: str) -> str:
    """The index's name in a set's folder."""
    return f"{split}.arrow"


def index_of(tar: bytes) -> str:
    """DALI's "v1.2" index of a tar of samples, with offsets as the tar has them, as DALI's wds2idx writes it.

    Raises:
        tarfile.TarError, ValueError, OverflowError: if it is no tar, is damaged, or has a member that none may have.
    """
    samples: dict[str, list[str]] = {}
    last = None
    with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as file:
        for member in file:
            if fault := fault_of(member):
                raise ValueError(f"the tar {fault}")
            name = member.name
            key, extension = split_name(name)
            # The name of a hidden file is all extension.
            if member.isdir() or not key or key.endswith("/"):
                continue
            if key != last and key in samples:
                raise ValueError(f"{name} does not follow the other parts of its sample")
            last = key
            samples.setdefault(key, []).append(f"{extension} {member.offset_data} {member.size} {name}")
    lines = [f"{INDEX_VERSION} {len(samples)}", *(" ".join(components) for components in samples.values())]
    return "\n".join(lines) + "\n"


def shard_rows(tar: bytes, index: str) -> pa.RecordBatch:
    """The rows of one shard, all of shard 0.

    Args:
        tar: the whole file.
        index: DALI's index of it, as it is written beside the tar.

    Raises:
        ValueError: if a sample has not one image and one label, or a label is no number that a label may be.
    """
    keys, offsets, sizes, labels, checksums = [], [], [], [], []
    for line in index.splitlines()[1:]:
        fields = line.split(" ")
        parts = {fields[i].lower(): fields[i + 1 : i + _FIELDS] for i in range(0, len(fields), _FIELDS)}
        images = [parts[extension] for extension in IMAGE_COMPONENTS if extension in parts]
        # Of two parts with one extension, as where two samples have one key, the second took the first one's place.
        if len(images) != 1 or LABEL_COMPONENT not in parts or len(parts) * _FIELDS != len(fields):
            raise ValueError(f"{', '.join(fields[_FIELDS - 1 :: _FIELDS])} are not one .jpg and one .cls")
        image = images[0]
        offset, size = int(image[0]), int(image[1])
        start, length = int(parts[LABEL_COMPONENT][0]), int(parts[LABEL_COMPONENT][1])
        keys.append(split_name(image[2])[0])
        offsets.append(offset)
        sizes.append(size)
        label = label_number(tar[start : start + length])
        if label is None:
            raise ValueError(f"{parts[LABEL_COMPONENT][2]} holds no number that a label may be")
        labels.append(label)
        checksums.append(zlib.crc32(tar[offset : offset + size]))
    return record_batch(keys, np.zeros(len(keys)), offsets, sizes, labels, checksums)


def record_batch(
    keys: Sequence[str] | pa.Array, shards: object, offsets: object, sizes: object, labels: object, checksums: object
) -> pa.RecordBatch:
    """A record batch of `SCHEMA` from its columns.

    Raises:
        ValueError: if a number does not fit its column.
    """
    columns = [keys if isinstance(keys, pa.Array) else _strings(keys)]
    for field, values in zip(list(SCHEMA)[1:], (shards, offsets, sizes, labels, checksums), strict=True):
        try:
            columns.append(_numbers(field, np.asarray(values, np.int64)))
        except OverflowError as error:
            raise ValueError(f"a number does not fit the column {field.name}: {error}") from error
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


# Arrow's arrays are made of their buffers: `pa.array` imports pandas, which takes each process half a second.


def _strings(values: Sequence[str]) -> pa.StringArray:
    encoded = [value.encode() for value in values]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    return pa.Array.from_buffers(pa.string(), len(encoded), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(encoded))])


def _numbers(field: pa.Field, values: NDArray[np.int64]) -> pa.Array:
    dtype = np.dtype(field.type.to_pandas_dtype())
    limits = np.iinfo(dtype)
    if len(values) and (values.min() < limits.min or values.max() > limits.max):
        raise ValueError(f"a number does not fit the column {field.name} ({dtype}): {values.min()} to {values.max()}")
    return pa.Array.from_buffers(field.type, len(values), [None, pa.py_buffer(values.astype(dtype))])


def pack_index(shards: Sequence[pa.RecordBatch]) -> bytes:
    """The index of a split.

    Args:
        shards: the rows of each shard that `dataset.json` lists, in its order.
    """
    numbers = np.repeat(np.arange(len(shards)), [len(rows) for rows in shards])
    shard = SCHEMA.field("shard")
    table = pa.Table.from_batches(shards, SCHEMA).set_column(1, shard, _numbers(shard, numbers))
    # One record batch: its columns are then whole arrays in the mapped file.
    batch = pa.RecordBatch.from_arrays([column.combine_chunks() for column in table.columns], schema=SCHEMA)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def describe_index(split: Split, index: bytes) -> Split:
    """A split with what `dataset.json` says of its index."""
    return dataclasses.replace(split, index_sha256=hashlib.sha256(index).hexdigest(), labels_crc32=_labels_crc32(index))


def _labels_crc32(index: bytes) -> int:
    labels = pa.ipc.open_file(index).get_batch(0)["label"].buffers()[1]
    return zlib.crc32(labels)


@dataclasses.dataclass(frozen=True)
class SampleIndex:
    """The rows of a split, memory-mapped: every array is a view of the file."""

    shards: NDArray[np.uint32]
    """[samples]: the number of the shard in `dataset.json`."""
    offsets: NDArray[np.uint64]
    """[samples]: where the image's bytes begin in the shard's file."""
    sizes: NDArray[np.uint32]
    """[samples]: how many bytes it has."""
    labels: NDArray[np.int32]
    """[samples]."""
    checksums: NDArray[np.uint32]
    """[samples]: CRC-32 of those bytes."""
    keys: pa.StringArray
    """[samples]: the sample's key in its tar."""

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> SampleIndex:
        """The columns of a record batch of `SCHEMA`."""
        keys, *numbers = batch.columns
        # Not to_numpy, which imports pandas.
        shards, offsets, sizes, labels, checksums = (
            np.frombuffer(column.buffers()[1], field.type.to_pandas_dtype(), len(column))
            for field, column in zip(list(SCHEMA)[1:], numbers, strict=True)
        )
        return cls(shards, offsets, sizes, labels, checksums, keys)

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, sample: int) -> str:
        """A sample's key.

        Raises:
            pyarrow.ArrowInvalid: if the file is damaged there.
        """
        found = self.keys.slice(int(sample), 1)
        # Its place in the file is a number of the file's own.
        found.validate(full=True)
        return str(found[0].as_py())

    def of_shard(self, number: int) -> slice:
        """The rows of one shard."""
        first, last = np.searchsorted(self.shards, [number, number + 1]).tolist()
        return slice(first, last)

    def part(self, number: int) -> SampleIndex:
        """The rows of one shard, on their own, to be sent to another process."""
        rows = self.of_shard(number)
        keys = pa.concat_arrays([self.keys.slice(rows.start, rows.stop - rows.start)])
        return SampleIndex(
            self.shards[rows], self.offsets[rows], self.sizes[rows], self.labels[rows], self.checksums[rows], keys
        )


def index_is_whole(root: Location, name: str, split: Split) -> bool:
    """Whether ROOT/NAME.arrow is what `dataset.json` says of it; reads all of it."""
    try:
        index = read(join(root, index_file(name)))
    except FileNotFoundError:
        return False
    # The sha256 first: of damaged bytes, Arrow raises errors of many kinds.
    return hashlib.sha256(index).hexdigest() == split.index_sha256 and _labels_crc32(index) == split.labels_crc32


def index_cure(root: Location, name: str) -> str:
    """What to do where ROOT/NAME.arrow is missing or damaged."""
    if staged_from(root) is not None:
        path = shown(join(root, index_file(name)))
        return f"this is a staged copy, so delete {path} and run the same command again, which stages it again"
    return (
        "run the command that made the set again, which adds it and changes no image: "
        f"python jobs/shard_imagenet.py --source IMAGES --output {quote(shown(root))}"
    )


def open_index(root: Location, name: str, split: Split, classes: int) -> SampleIndex:
    """Maps ROOT/NAME.arrow, or reads it whole from a URL.

    Offsets and sizes need no look here: whatever they say, an image's checksum vouches for what is read. Labels
    have one together, which is compared.

    Raises:
        DatasetError: if the index is missing, or is not the one that `dataset.json` describes.
    """
    path, cure = shown(join(root, index_file(name))), index_cure(root, name)
    try:
        index = _map(join(root, index_file(name)))
    except FileNotFoundError:
        raise DatasetError(f"{path} is missing: {cure}") from None
    except (pa.ArrowException, ValueError, OSError) as error:
        raise DatasetError(f"{path} is damaged ({error}): {cure}") from error
    if len(index) != split.samples or zlib.crc32(index.labels.data) != split.labels_crc32:
        raise DatasetError(f"{path} is not the index that dataset.json describes: {cure}")
    if len(index) and (
        index.shards.max() >= len(split.shards) or index.labels.min() < 0 or index.labels.max() >= classes
    ):
        raise DatasetError(f"{path} names a shard or a class that the set does not have: {cure}")
    return index


def _map(location: str) -> SampleIndex:
    """Raises ArrowException or ValueError for a file that `pack_index` did not make, OSError if it cannot be read."""
    reader = pa.ipc.open_file(read(location) if is_url(location) else pa.memory_map(location))
    if not reader.schema.equals(SCHEMA) or reader.num_record_batches != 1:
        raise ValueError(f"its schema is {reader.schema.names} in {reader.num_record_batches} batches")
    batch = reader.get_batch(0)
    batch.validate()
    if any(column.null_count for column in batch.columns):
        raise ValueError("a column lacks values")
    return SampleIndex.of(batch)
