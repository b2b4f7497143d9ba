"""The sample index and what opens by it: read independently from the tars, damaged, of another set, and of any size.

Faults of shards that are open are in `test_read_faults`.
"""

from __future__ import annotations

import hashlib
import os
import resource
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.dataset.info import ClassLabel, DatasetError, DatasetInfo, ShardRow, Split, read_dataset
from pipeline.dataset.sample_index import SCHEMA, describe_index, pack_index, record_batch
from pipeline.dataset.split_reader import END_OF_IMAGE, SplitReader
from pipeline.staging.staging import stage
from tests.damage import flip_bit, overwrite, places


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_index_is_what_the_tars_hold(shard_set: Path, split: str) -> None:
    """As any reader of Arrow finds it, uncompressed in one piece."""
    file = shard_set / f"{split}.arrow"
    with pa.ipc.open_file(file) as reader:
        assert reader.num_record_batches == 1
        batch = reader.get_batch(0)
    assert batch.schema == SCHEMA
    found = places(shard_set, split)
    assert [tuple(row.values()) for row in batch.to_pylist()] == [
        (place.key, int(place.shard[-6:]), place.image, place.size, place.number, zlib.crc32(place.jpeg))
        for place in found
    ]
    part = read_dataset(shard_set).splits[split]
    assert hashlib.sha256(file.read_bytes()).hexdigest() == part.index_sha256
    assert zlib.crc32(np.array([place.number for place in found], "<i4").tobytes()) == part.labels_crc32


def test_the_reader_gives_what_the_tars_hold(shard_set: Path) -> None:
    reader = SplitReader(shard_set, read_dataset(shard_set), "train")
    found = places(shard_set, "train")
    assert len(reader) == len(found) == 45
    order = np.random.default_rng(0).permutation(45)
    rows = reader.read(order)
    for row, sample in zip(rows, order.tolist(), strict=True):
        place = found[sample]
        assert row[: place.size].tobytes() == reader.image(sample).tobytes() == place.jpeg
        # Else a JPEG that lacks its end marker would be decoded on into what the memory held.
        assert row[place.size : place.size + 2].tobytes() == END_OF_IMAGE
        assert (reader.key(sample), reader.labels[sample]) == (place.key, place.number)
    assert reader.read(np.array([], np.int64)).shape == (0, 2)


# An index that is not the set's.


def flip_a_label(path: Path) -> None:
    """One bit of the first label, to another class of the set: no other part of the file would notice."""
    with pa.ipc.open_file(path) as reader:
        column = np.frombuffer(reader.get_batch(0)["label"].buffers()[1], np.int32)
    at = path.read_bytes().index(column.tobytes())
    flip_bit(path, at, 0)


def change_schema(path: Path) -> None:
    table = pa.ipc.open_file(path).read_all().rename_columns(["key", "shard", "offset", "length", "label", "crc32"])
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


def leave_out_an_offset(path: Path) -> None:
    (batch,) = pa.ipc.open_file(path).read_all().to_batches()
    offsets = pa.array([None, *batch["offset"].to_pylist()[1:]], pa.uint64())
    columns = [offsets if name == "offset" else batch[name] for name in batch.schema.names]
    with pa.ipc.new_file(path, SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))


CHANGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "a label's bit": flip_a_label,
    "of another split": lambda path: path.write_bytes(path.with_name("val.arrow").read_bytes()),
    "other columns": change_schema,
    "a value missing": leave_out_an_offset,
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_index_that_is_not_the_sets_is_refused_with_the_cure(root: Path, change: str) -> None:
    CHANGES[change](root / "train.arrow")
    with pytest.raises(DatasetError) as found:
        SplitReader(root, read_dataset(root), "train")
    line = str(found.value)
    assert line.startswith(f"{root}/train.arrow is ")
    assert line.endswith(f"python jobs/shard_imagenet.py --source IMAGES --output {root}")
    assert "\n" not in line


def test_a_staged_copys_index_is_staged_again(shard_set: Path, tmp_path: Path) -> None:
    staged = stage(str(shard_set), tmp_path, lambda _: None)
    whole = (staged / "train.arrow").read_bytes()
    flip_a_label(staged / "train.arrow")
    with pytest.raises(DatasetError, match=r"this is a staged copy, so delete .* and run the same command again"):
        SplitReader(staged, read_dataset(staged), "train")
    assert stage(str(shard_set), tmp_path, lambda _: None) == staged
    assert (staged / "train.arrow").read_bytes() == whole


# What is refused at once.


def test_more_shards_than_files_may_be_open_raise_the_limit(shard_set: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 2, hard))
    try:
        reader = SplitReader(shard_set, read_dataset(shard_set), "train")
        assert all(reader.image(sample).size > 0 for sample in range(len(reader)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_shards_than_the_system_allows_are_refused(shard_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4, 4))
    with pytest.raises(OSError, match=r"a process may have 4 files open, and \d+ are needed: allow more by ulimit -Hn"):
        SplitReader(shard_set, read_dataset(shard_set), "train")


@pytest.mark.parametrize("missing", [True, False])
def test_a_shard_of_another_size_is_refused_with_the_cure(root: Path, missing: bool) -> None:
    tar = root / "train" / "train-000001.tar"
    if missing:
        tar.unlink()
    else:
        os.truncate(tar, 1000)
    cure = rf"rm {root}/train/train-000001\.\* && python jobs/shard_imagenet.py --source IMAGES --output {root}$"
    said = "is missing" if missing else r"has \d+ bytes, dataset\.json says \d+"
    with pytest.raises(DatasetError, match=rf"train-000001\.tar {said}: .* {cure}"):
        SplitReader(root, read_dataset(root), "train")


# Numbers of any size.


def one_shard(root: Path, rows: pa.RecordBatch, size: int) -> DatasetInfo:
    """A set of three classes and one shard of so many bytes, all a hole, with this index."""
    (root / "train").mkdir(parents=True)
    (root / "train" / "train-000000.tar").touch()
    os.truncate(root / "train" / "train-000000.tar", size)
    row = ShardRow("train-000000", len(rows), size, "0" * 64)
    index = pack_index([rows])
    (root / "train.arrow").write_bytes(index)
    classes = tuple(ClassLabel(i, f"n{i}", f"n{i}") for i in range(3))
    split = describe_index(Split(len(rows), size, (row,)), index)
    return DatasetInfo(classes, {"train": split}, {"encoder": ""}, 0, None, "", 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("offset", [2**31 + 5, 2**32 - 4, 5 * 2**30])
def test_an_image_far_into_a_large_tar(tmp_path: Path, offset: int) -> None:
    info = one_shard(tmp_path, record_batch(["n1_a"], [0], [offset], [4], [1], [zlib.crc32(b"jpeg")]), offset + 4)
    overwrite(tmp_path / "train" / "train-000000.tar", offset, b"jpeg")
    reader = SplitReader(tmp_path, info, "train")
    assert reader.image(0).tobytes() == b"jpeg"
    assert reader.key(0) == "n1_a"


@pytest.mark.parametrize(("column", "value"), [("shard", 1), ("label", 3), ("label", -1)])
def test_a_shard_or_class_that_the_set_has_not_is_refused(tmp_path: Path, column: str, value: int) -> None:
    columns = {"shard": [0], "offset": [0], "size": [4], "label": [0], "crc32": [0], column: [value]}
    rows = record_batch(["a"], *columns.values())
    info = one_shard(tmp_path, rows, 100)
    if column == "shard":
        # `pack_index` numbers the shards itself.
        batch = pa.RecordBatch.from_arrays(rows.columns, schema=SCHEMA)
        with pa.ipc.new_file(tmp_path / "train.arrow", SCHEMA) as writer:
            writer.write_batch(batch)
    with pytest.raises(DatasetError, match=r"train\.arrow names a shard or a class that the set does not have"):
        SplitReader(tmp_path, info, "train")


def test_opening_reads_no_tar_and_copies_no_column(shard_set: Path, root: Path) -> None:
    """A rank's private memory does not grow with the set."""
    for path in (root / "train").iterdir():
        os.truncate(path, 0)
        os.truncate(path, (shard_set / "train" / path.name).stat().st_size)
    index = SplitReader(root, read_dataset(root), "train").index
    assert index.labels.tolist() == SplitReader(shard_set, read_dataset(shard_set), "train").labels.tolist()
    for column in (index.shards, index.offsets, index.sizes, index.labels, index.checksums):
        assert not column.flags.owndata
        assert not column.flags.writeable
