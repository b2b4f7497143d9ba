"""What a set holds: each image once, in seeded order, in the tars and indexes that others would write."""

from __future__ import annotations

import importlib
import io
import os
import random
import tarfile
import threading
from pathlib import Path

import pytest

from pipeline.dataset.info import read_dataset
from pipeline.dataset.sample_index import index_of
from pipeline.dataset.split_reader import SplitReader
from pipeline.sharding.pack import pack
from pipeline.sharding.read_ahead import THREADS, readings
from pipeline.sources import files
from pipeline.sources.files import LocalRanges, read_bytes
from pipeline.sources.listing import Entry
from pipeline.sources.sources import read_source
from tests.photographs import write_source
from tests.shard_sets import planned, tars

wds2idx = importlib.import_module("wds2idx")  # DALI's own indexer, which comes without types.


def test_every_image_is_stored_once_under_its_own_label(images: Path, whole: Path) -> None:
    info = read_dataset(whole)
    assert [label.wnid for label in info.classes] == ["n0", "n1", "n2"]
    for split, entries in planned(images).listing.splits.items():
        reader = SplitReader(whole, info, split)
        stored = {reader.key(i): int(reader.labels[i]) for i in range(len(reader))}
        assert stored == {entry.key: entry.label for entry in entries}
        assert len(reader) == len(entries) == info.splits[split].samples
    assert [shard.samples for shard in info.splits["train"].shards] == [4, 4, 4, 3]
    assert sorted(path.name for path in whole.iterdir()) == [
        *("contact_sheet.jpg", "dataset.json", "rejects.jsonl"),
        *("train", "train.arrow", "val", "val.arrow"),
    ]


def test_order_mixes_classes_and_depends_on_seed_split_and_count_alone(images: Path, source: Path) -> None:
    def keys(folder: Path, per_shard: int = 4, seed: int = 0) -> list[str]:
        shards = planned(folder, per_shard=per_shard, seed=seed).shards
        return [entry.key for shard in shards if shard.split == "train" for entry in shard.entries]

    expected = keys(images)
    assert expected != sorted(expected)
    assert keys(images, per_shard=3) == expected
    assert keys(images, seed=1) != expected
    for file in source.glob("*/*"):
        file.write_bytes(b"other bytes")
    assert keys(source) == expected


def test_index_equals_dalis_own(shard_set: Path, tmp_path: Path) -> None:
    for tar in [*tars(shard_set, "train"), *tars(shard_set, "val")]:
        creator = wds2idx.IndexCreator(str(tar), str(tmp_path / "reference.idx"), verbose=False)
        creator.create_index()
        creator.close()
        assert tar.with_suffix(".idx").read_bytes() == (tmp_path / "reference.idx").read_bytes()


# So many bytes that what ends a tar, two blocks of zeros and what fills its record of 20 blocks, is every way long.
@pytest.mark.parametrize("last", [10_000, 2_560, 3_072, 3_584, 4_096, 4_608])
def test_a_tar_and_its_index_are_those_of_tarfile(last: int) -> None:
    samples = [("k" * 90, 999, b"jpeg"), ("a", 0, b""), ("b", 7, bytes(512)), ("c", 12, bytes(last))]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, label, jpeg in samples:
            for name, data in ((f"{key}.cls", str(label).encode()), (f"{key}.jpg", jpeg)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    assert pack(samples) == (buffer.getvalue(), index_of(buffer.getvalue()))


# Reading the source.


def test_images_on_a_disk_are_read_many_at_a_time_and_in_order(tmp_path: Path) -> None:
    source = write_source(tmp_path / "images", images=16, longest=64)
    entries = read_source(source, None, 0.1, 0).splits["train"][: 3 * THREADS]
    first, bad = {entry.path for entry in entries[:THREADS]}, entries[THREADS + 1]
    together = threading.Barrier(THREADS)

    def read(entry: Entry) -> bytes:
        if entry.path in first:
            # Passed by none before so many wait here.
            together.wait(timeout=30)
        if entry == bad:
            raise OSError("unreadable")
        return read_bytes(entry.path, entry.offset, entry.size)

    read_back = []
    for entry, get in readings(entries, read):
        if entry == bad:
            with pytest.raises(OSError, match="unreadable"):
                get()
        else:
            assert get() == Path(entry.path).read_bytes()
        read_back.append(entry)
    assert read_back == list(entries)


def test_each_tar_is_opened_once_and_a_new_one_in_its_place_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def open_counted(path: str) -> LocalRanges:
        opened.append(path)
        return LocalRanges(path)

    monkeypatch.setattr(files, "LocalRanges", open_counted)
    paths = [tmp_path / f"{number}.tar" for number in range(50)]
    for path in paths:
        path.write_bytes(path.name.encode() * 10)
    before = len(os.listdir("/proc/self/fd"))
    for path in random.Random(0).choices(paths, k=2000):
        assert read_bytes(str(path), 0, len(path.name)) == path.name.encode()
    assert len(opened) == len(paths)
    (tmp_path / "new").write_bytes(b"n.tar" * 10)
    os.replace(tmp_path / "new", paths[0])
    assert read_bytes(str(paths[0]), 0, 5) == b"n.tar"
    # Those forgotten are closed.
    files._opened.cache_clear()
    assert len(os.listdir("/proc/self/fd")) <= before
