"""Shards that are damaged, cut, written to or replaced, and disks that fail: one error that says what and how to mend.

Each fault meets the reader alone and the loader, whose caller must get no image and no label that is not the set's.
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
from tests.damage import OtherImages, Place, flip_in_the_header, flip_in_the_middle, overwrite, own_copy, places

CPU = torch.device("cpu")
BAD = 23  # A sample of the third shard of ten.
FIRST = 20  # Of that shard.


@pytest.fixture
def root(shard_set: Path, tmp_path: Path) -> Path:
    return own_copy(shard_set, tmp_path / "shards")


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
    whole, rgb = open_train(shard_set), read_dataset(shard_set).rgb
    planned = list(center_crops(np.arange(len(reader))).chunks(5))
    expected = {b.samples[0]: b for b in Loader(whole, rgb, 5, CPU, 1).run(planned)}
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


def rebuild(root: Path) -> str:
    return f"rm {root}/train/train-000002.* && python jobs/shard_imagenet.py --source IMAGES --output {root}"


@both
@pytest.mark.parametrize("flip", [flip_in_the_middle, flip_in_the_header])
def test_a_flipped_bit(root: Path, shard_set: Path, way: Way, flip: Callable[[Place], None]) -> None:
    place = place_of(root)
    flip(place)
    line = failure(way, open_train(root), shard_set)
    assert line.startswith(f"train image {place.key} of train-000002: it is not what was written: ")
    assert line.endswith(rebuild(root))


def test_a_bit_flipped_in_the_middle_would_decode_to_other_pixels(root: Path, shard_set: Path) -> None:
    """So that the test above is about images that no decoder can refuse."""
    place, whole = place_of(root), open_train(shard_set)
    flip_in_the_middle(place)
    jpeg = place.tar.read_bytes()[place.image : place.image + place.size]
    (batch,) = Loader(OtherImages(whole, {BAD: np.frombuffer(jpeg, np.uint8)}), read_dataset(root).rgb, 1, CPU, 1).run(
        [center_crops(np.array([BAD]))]
    )
    (right,) = Loader(whole, read_dataset(root).rgb, 1, CPU, 1).run([center_crops(np.array([BAD]))])
    assert not torch.equal(batch.images, right.images)


@both
@pytest.mark.parametrize("flip", [flip_in_the_middle, flip_in_the_header])
def test_damage_that_comes_while_the_shard_is_open(
    root: Path, shard_set: Path, way: Way, flip: Callable[[Place], None]
) -> None:
    place, reader = place_of(root), open_train(root)
    flip(place)
    line = failure(way, reader, shard_set)
    assert line.startswith(f"train image {place.key} of train-000002: the shard was written to after it was opened; ")
    assert line.endswith(rebuild(root))


@both
def test_damage_that_leaves_no_trace_in_the_files_times(root: Path, shard_set: Path, way: Way) -> None:
    """A failing disk changes bytes and no times."""
    place, reader = place_of(root), open_train(root)
    before = place.tar.stat()
    flip_in_the_middle(place)
    os.utime(place.tar, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert f"{place.key} of train-000002: it is not what was written" in failure(way, reader, shard_set)


@both
def test_a_shard_cut_while_it_is_open(root: Path, shard_set: Path, way: Way) -> None:
    """Read from a memory map, this would be SIGBUS, and no test would report anything."""
    place = place_of(root)
    reader, size = open_train(root), place.tar.stat().st_size
    os.truncate(place.tar, place.image + 1)
    line = failure(way, reader, shard_set)
    assert line.startswith(
        f"train image {place.key} of train-000002: the shard had {size} bytes when it was opened and has "
        f"{place.image + 1} "
    )
    assert line.endswith(rebuild(root))


@both
def test_a_shard_rewritten_while_it_is_open(root: Path, shard_set: Path, way: Way) -> None:
    """By another shard's bytes, as a copy over it does."""
    tar = place_of(root).tar
    reader = open_train(root)
    other = tar.with_name("train-000000.tar").read_bytes()
    overwrite(tar, 0, other[: tar.stat().st_size].ljust(tar.stat().st_size, b"\0"))
    line = failure(way, reader, shard_set)
    first = places(shard_set, "train")[FIRST].key
    assert line.startswith(f"train image {first} of train-000002: the shard was written to after it was opened; ")
    assert line.endswith(rebuild(root))


@both
def test_a_shard_written_again_as_it_was_is_read_on(root: Path, shard_set: Path, way: Way) -> None:
    """The checksums vouch for it, whatever its times say."""
    tar, reader = place_of(root).tar, open_train(root)
    overwrite(tar, 0, tar.read_bytes())
    way(reader, shard_set)


@both
def test_a_shard_replaced_by_rename_is_read_as_it_was(root: Path, shard_set: Path, way: Way) -> None:
    tar, reader = place_of(root).tar, open_train(root)
    new = tar.with_name("new")
    size = tar.stat().st_size
    new.write_bytes(tar.with_name("train-000000.tar").read_bytes()[: size - 1].ljust(size - 1, b"\0"))
    new.replace(tar)
    way(reader, shard_set)
    # Who opens the set now is told.
    with pytest.raises(DatasetError, match=rf"train-000002\.tar has {size - 1} bytes, dataset\.json says {size}: "):
        open_train(root)


@both
def test_a_disk_that_fails(root: Path, shard_set: Path, way: Way) -> None:
    """A real EIO of the kernel: reads of a process's memory fail so where nothing is mapped."""
    place, reader = place_of(root), open_train(root)
    file = reader._files[2]
    memory = os.open("/proc/self/mem", os.O_RDONLY)
    try:
        os.dup2(memory, file.descriptor, inheritable=False)
    finally:
        os.close(memory)
    line = failure(way, reader, shard_set)
    first = places(root, "train")[FIRST].key
    assert line.startswith(f"train image {first} of train-000002: it cannot be read: [Errno 5] Input/output error; ")
    assert line.endswith(rebuild(root))
    assert place.tar.exists()


def test_a_disk_that_fails_in_the_middle_of_an_image(
    root: Path, shard_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel gives what it has, and the error when asked for the rest."""
    place, reader = place_of(root), open_train(root)
    kernel, bad = os.preadv, place.image + 1000

    def preadv(descriptor: int, rooms: tuple[memoryview], offset: int) -> int:
        end = offset + len(rooms[0])
        if descriptor != reader._files[2].descriptor or end <= bad or offset > place.image + place.size:
            return kernel(descriptor, rooms, offset)
        if offset >= bad:
            raise OSError(5, "Input/output error")
        return kernel(descriptor, (rooms[0][: bad - offset],), offset)

    monkeypatch.setattr("pipeline.dataset.shard_file.os.preadv", preadv)
    with pytest.raises(DatasetError, match=rf"{place.key} of train-000002: it cannot be read: \[Errno 5\]"):
        through_reader(reader, shard_set)


def test_a_read_that_the_kernel_cuts_short_is_gone_on_with(
    root: Path, shard_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = os.preadv
    monkeypatch.setattr(
        "pipeline.dataset.shard_file.os.preadv", lambda file, rooms, offset: kernel(file, (rooms[0][:100],), offset)
    )
    through_reader(open_train(root), shard_set)


def test_a_label_rewritten_in_the_tar_changes_nothing(root: Path, shard_set: Path) -> None:
    """Labels come from the index; verify_shards.py holds the tars against it."""
    for place in places(root, "train"):
        overwrite(place.tar, place.label, b"1")
    through_loader(open_train(root), shard_set)


@both
def test_a_staged_copy_says_what_to_delete_and_is_staged_again(
    root: Path, shard_set: Path, tmp_path: Path, way: Way
) -> None:
    staged = stage(str(root), tmp_path / "disk", lambda line: None)
    place = place_of(staged)
    flip_in_the_middle(place)
    line = failure(way, open_train(staged), shard_set)
    assert f"train image {place.key} of train-000002: it is not what was written" in line
    told = re.search(r"delete (\S+) and run the same command again, which stages it from (\S+);", line)
    assert told is not None
    assert told[2] == str(root)
    os.unlink(told[1])
    lines: list[str] = []
    assert stage(str(root), tmp_path / "disk", lines.append) == staged
    assert "in 1 of 7 shards" in lines[0]
    way(open_train(staged), shard_set)


def test_a_loader_can_be_used_after_a_fault(root: Path, shard_set: Path) -> None:
    """The images before the fault come, whole, from the loader that met it."""
    flip_in_the_middle(place_of(root))
    reader, whole = open_train(root), open_train(shard_set)
    rgb = read_dataset(root).rgb
    loader = Loader(reader, rgb, 5, CPU, 1)
    with pytest.raises(DatasetError):
        list(loader.run(center_crops(np.arange(45)).chunks(5)))
    planned = list(center_crops(np.arange(FIRST)).chunks(5))
    for again, expected in zip(loader.run(planned), Loader(whole, rgb, 5, CPU, 1).run(planned), strict=True):
        assert torch.equal(again.images, expected.images)
        assert again.samples.tolist() == expected.samples.tolist()
