"""Shards that are damaged, cut, written to or replaced, and disks that fail: one error that says what and how to mend.

The reader meets every fault, and the loader, whose processes read for it, those that differ in where they come up. No
caller gets an image or a label that is not the set's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.dataset.info import DatasetError, read_dataset
from pipeline.dataset.split_reader import SplitReader
from pipeline.loading.loader import Loader
from pipeline.loading.plan import center_crops
from pipeline.staging.staging import stage
from tests.damage import Place, flip_in_the_header, flip_in_the_middle, overwrite, places

CPU = torch.device("cpu")
BAD = 23  # A sample of the third shard of ten.
FIRST = 20  # Of that shard.


def place_of(root: Path) -> Place:
    return places(root, "train")[BAD]


def open_train(root: Path) -> SplitReader:
    return SplitReader(root, read_dataset(root), "train")


def through_reader(reader: SplitReader, shard_set: Path) -> None:
    """Reads sample after sample; what comes before the fault must be the set's."""
    whole = open_train(shard_set)
    for sample in range(len(reader)):
        assert reader.image(sample).tobytes() == whole.image(sample).tobytes()
        assert reader.labels[sample] == whole.labels[sample]


def through_loader(reader: SplitReader, shard_set: Path) -> None:
    """The same through DALI, in batches of five."""
    rgb = read_dataset(shard_set).rgb
    planned = list(center_crops(np.arange(len(reader))).chunks(5))
    expected = {b.samples[0]: b for b in Loader(open_train(shard_set), rgb, 5, CPU, 1).run(planned)}
    for batch in Loader(reader, rgb, 5, CPU, 2).run(planned):
        assert torch.equal(batch.images, expected[batch.samples[0]].images)
        assert torch.equal(batch.labels, expected[batch.samples[0]].labels)


both = pytest.mark.parametrize("way", [through_reader, through_loader])
Way = Callable[[SplitReader, Path], None]


def failure(way: Way, reader: SplitReader, shard_set: Path) -> str:
    """The one line of the error that the way ends with."""
    with pytest.raises(DatasetError) as found:
        way(reader, shard_set)
    line = str(found.value)
    assert "\n" not in line
    return line


@both
@pytest.mark.parametrize("flip", [flip_in_the_middle, flip_in_the_header])
def test_a_flipped_bit(root: Path, shard_set: Path, way: Way, flip: Callable[[Place], None]) -> None:
    flip(place_of(root))
    line = failure(way, open_train(root), shard_set)
    assert line.startswith(f"train image {place_of(root).key} of train-000002: it is not what was written: ")
    assert line.endswith(
        f"rm {root}/train/train-000002.* && python jobs/shard_imagenet.py --source IMAGES --output {root}"
    )


# Faults that come while the shard is open.


def cut(place: Place) -> None:
    """Read from a memory map, this would be SIGBUS, and no test would report anything."""
    os.truncate(place.tar, place.image + 1)


@pytest.mark.parametrize(
    ("damage", "message", "way"),
    [
        (flip_in_the_middle, "it is not what was written: ", through_reader),
        (cut, r"it ends after 1 of \d+ bytes; ", through_reader),
        (cut, r"it ends after 1 of \d+ bytes; ", through_loader),
    ],
)
def test_damage_that_comes_while_the_shard_is_open(
    root: Path, shard_set: Path, damage: Callable[[Place], None], message: str, way: Way
) -> None:
    reader, place = open_train(root), place_of(root)
    damage(place)
    assert re.match(f"train image {place.key} of train-000002: {message}", failure(way, reader, shard_set))


def test_a_shard_written_again_as_it_was_is_read_on(root: Path, shard_set: Path) -> None:
    """The checksums vouch for it, whatever its times say."""
    tar, reader = place_of(root).tar, open_train(root)
    overwrite(tar, 0, tar.read_bytes())
    through_reader(reader, shard_set)


def test_a_shard_replaced_by_rename_is_read_as_it_was(root: Path, shard_set: Path) -> None:
    tar, reader = place_of(root).tar, open_train(root)
    tar.with_name("new").write_bytes(bytes(tar.stat().st_size - 1))
    tar.with_name("new").replace(tar)
    through_loader(reader, shard_set)


@both
def test_a_disk_that_fails(root: Path, shard_set: Path, way: Way) -> None:
    """A real EIO of the kernel: reads of a process's memory fail so where nothing is mapped."""
    reader, first = open_train(root), places(root, "train")[FIRST].key
    memory = os.open("/proc/self/mem", os.O_RDONLY)
    try:
        os.dup2(memory, reader._files[2].descriptor, inheritable=False)
    finally:
        os.close(memory)
    line = failure(way, reader, shard_set)
    assert line.startswith(f"train image {first} of train-000002: it cannot be read: [Errno 5] Input/output error; ")


def test_a_read_that_the_kernel_cuts_short_is_gone_on_with_until_the_disk_fails(
    root: Path, shard_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel gives what it has, and the error when asked for the rest."""
    place, reader = place_of(root), open_train(root)
    kernel, bad, fails = os.preadv, place.image + 1000, False

    def preadv(descriptor: int, rooms: tuple[memoryview], offset: int) -> int:
        if fails and descriptor == reader._files[2].descriptor and bad <= offset < place.image + place.size:
            raise OSError(5, "Input/output error")
        return kernel(descriptor, (rooms[0][:500],), offset)

    monkeypatch.setattr("pipeline.dataset.shard_file.os.preadv", preadv)
    through_reader(reader, shard_set)
    fails = True
    with pytest.raises(DatasetError, match=rf"{place.key} of train-000002: it cannot be read: \[Errno 5\]"):
        through_reader(reader, shard_set)


def test_a_staged_copy_says_what_to_delete_and_is_staged_again(root: Path, shard_set: Path, tmp_path: Path) -> None:
    staged = stage(str(root), tmp_path / "disk", lambda line: None)
    flip_in_the_middle(place_of(staged))
    line = failure(through_reader, open_train(staged), shard_set)
    told = re.search(r"delete (\S+) and run the same command again, which stages it from (\S+);", line)
    assert told is not None
    assert told[2] == str(root)
    os.unlink(told[1])
    lines: list[str] = []
    assert stage(str(root), tmp_path / "disk", lines.append) == staged
    assert "in 1 of 7 shards" in lines[0]
    through_reader(open_train(staged), shard_set)
