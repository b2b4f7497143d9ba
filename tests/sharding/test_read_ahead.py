"""Reading from disks: several images at a time, as NFS wants it, and each tar opened once."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest

from pipeline.sharding.read_ahead import AHEAD, readings
from pipeline.sources import files
from pipeline.sources.files import LocalRanges, read_bytes
from pipeline.sources.listing import Entry
from pipeline.sources.sources import read_source
from tests.photographs import write_source


def test_images_on_a_disk_are_read_many_at_a_time_and_in_order(tmp_path: Path) -> None:
    source = write_source(tmp_path / "images", images=16, longest=64)
    entries = read_source(source, None, 0.1, 0).splits["train"][: 2 * AHEAD]
    together = threading.Barrier(AHEAD)

    def read(entry: Entry) -> bytes:
        # Passed by none before so many wait here.
        together.wait(timeout=30)
        return read_bytes(entry.path, entry.offset, entry.size)

    read_back = [(entry, get()) for entry, get in readings(entries, read)]
    assert read_back == [(entry, Path(entry.path).read_bytes()) for entry in entries]


class Counted(LocalRanges):
    opened = 0

    def __init__(self, path: str) -> None:
        Counted.opened += 1
        super().__init__(path)


def test_each_tar_is_opened_once_and_a_new_one_in_its_place_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LocalRanges", Counted)
    paths = [tmp_path / f"{number}.tar" for number in range(50)]
    for path in paths:
        path.write_bytes(path.name.encode() * 10)
    before = len(os.listdir("/proc/self/fd"))
    for path in random.Random(0).choices(paths, k=2000):
        assert read_bytes(str(path), 0, len(path.name)) == path.name.encode()
    assert Counted.opened == len(paths)
    (tmp_path / "new").write_bytes(b"n.tar" * 10)
    os.replace(tmp_path / "new", paths[0])
    assert read_bytes(str(paths[0]), 0, 5) == b"n.tar"
    # Those forgotten are closed.
    files._opened.cache_clear()
    assert len(os.listdir("/proc/self/fd")) <= before
