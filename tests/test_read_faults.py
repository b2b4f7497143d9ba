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

from jobs.worker import WorkerData
from model.recipe import Recipe
from model.training import Worker
from pipeline.annotation import read_annotation
from pipeline.dataset import DatasetError, ImageError, read_dataset, write_json
from pipeline.loader import Loader, LoaderError
from pipeline.plan import centre_views
from pipeline.split_reader import SplitReader
from pipeline.staging import stage
from tests.damage import Place, flip_in_the_header, flip_in_the_middle, overwrite, own_copy, places

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
    views = list(centre_views(np.arange(len(reader))).chunks(5))
    expected = {b.samples[0]: b for b in Loader(whole, rgb, 5, CPU, 1).run(views)}
    for batch in Loader(reader, rgb, 5, CPU, 2).run(views):
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
    return f"python jobs/shard_imagenet.py --source IMAGES --output {root} --only train-000002"


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
    flip_in_the_middle(place_of(root))
    for path in (root / "train").glob("*.json"):
        path.unlink()
    with pytest.raises(AssertionError):
        through_loader(open_train(root), shard_set)


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
@pytest.mark.parametrize("crc32", [True, False])
def test_a_shard_cut_while_it_is_open(root: Path, shard_set: Path, way: Way, crc32: bool) -> None:
    """Read from a memory map, this would be SIGBUS, and no test would report anything."""
    place = place_of(root)
    if not crc32:
        place.tar.with_suffix(".json").unlink()
    reader, size = open_train(root), place.tar.stat().st_size
    os.truncate(place.tar, place.image + 1)
    line = failure(way, reader, shard_set)
    key = place.key if crc32 else places(shard_set, "train")[FIRST].key
    assert line.startswith(
        f"train image {key} of train-000002: the shard had {size} bytes when it was opened and has {place.image + 1} "
    )
    assert line.endswith(rebuild(root))


@both
@pytest.mark.parametrize("crc32", [True, False])
def test_a_shard_rewritten_while_it_is_open(root: Path, shard_set: Path, way: Way, crc32: bool) -> None:
    """By another shard's bytes, as a copy over it does. Without checksums nothing vouches for any of its images."""
    tar = place_of(root).tar
    if not crc32:
        tar.with_suffix(".json").unlink()
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
        os.dup2(memory, file._descriptor, inheritable=False)
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
    kernel, bad = os.pread, place.image + 1000

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        if descriptor != reader._files[2]._descriptor or offset + size <= bad or offset > place.image + place.size:
            return kernel(descriptor, size, offset)
        if offset >= bad:
            raise OSError(5, "Input/output error")
        return kernel(descriptor, bad - offset, offset)

    monkeypatch.setattr("pipeline.shard_file.os.pread", pread)
    with pytest.raises(ImageError, match=rf"{place.key} of train-000002: it cannot be read: \[Errno 5\]") as found:
        through_reader(reader, shard_set)
    assert (found.value.sample, found.value.shard, found.value.key) == (BAD, "train-000002", place.key)


def test_a_read_that_the_kernel_cuts_short_is_gone_on_with(
    root: Path, shard_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = os.pread
    monkeypatch.setattr(
        "pipeline.shard_file.os.pread", lambda descriptor, size, offset: kernel(descriptor, min(size, 100), offset)
    )
    through_reader(open_train(root), shard_set)


@pytest.mark.parametrize("digit", [b"0", b"1", b"7", b"x"])
def test_a_wrong_digit_in_a_label_is_found_when_the_set_is_opened(root: Path, digit: bytes) -> None:
    place = places(root, "train")[next(i for i, p in enumerate(places(root, "train")) if p.key.startswith("n2"))]
    overwrite(place.tar, place.label, digit)
    with pytest.raises(DatasetError) as found:
        open_train(root)
    line = str(found.value)
    assert f"sample {place.key}.jpg has the label " in line
    assert line.endswith(f"--output {root} --only {place.shard}")
    assert "\n" not in line


def test_a_label_rewritten_while_the_shard_is_open_changes_nothing(root: Path, shard_set: Path) -> None:
    """All labels are read, and checked against the keys, when the set is opened."""
    reader = open_train(root)
    for place in places(root, "train"):
        overwrite(place.tar, place.label, b"1")
    through_loader(reader, shard_set)


@both
def test_a_staged_copy_says_what_to_delete_and_is_staged_again(
    root: Path, shard_set: Path, tmp_path: Path, way: Way
) -> None:
    staged = stage(str(root), tmp_path / "disk", lambda line: None)
    place = place_of(staged)
    flip_in_the_middle(place)
    line = failure(way, open_train(staged), shard_set)
    assert f"train image {place.key} of train-000002: it is not what was written" in line
    told = re.search(r"delete (\S+) and run the same command again, which copies it from (\S+);", line)
    assert told is not None
    assert told[2] == str(root)
    os.unlink(told[1])
    lines: list[str] = []
    assert stage(str(root), tmp_path / "disk", lines.append) == staged
    assert "in 1 of 7 shards" in lines[0]
    way(open_train(staged), shard_set)


def without_checksums(root: Path) -> None:
    """As the oldest annotations are."""
    for path in (root / "train").glob("*.json"):
        annotation = read_annotation(path).to_json()
        write_json(path, {name: value for name, value in annotation.items() if name != "crc32"})


def test_a_set_without_checksums_is_read_and_says_so_once(
    root: Path, shard_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without_checksums(root)
    through_reader(open_train(root), shard_set)
    for rank in range(3):
        WorkerData(root, Recipe(batch_size=6), Worker(rank, 3, CPU), 2, 1)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "5 train shard(s) have no checksums in their annotations: a damaged image there is found only if it does not "
        "decode"
    ]


def test_without_checksums_an_image_that_does_not_decode_is_named(root: Path, shard_set: Path) -> None:
    without_checksums(root)
    place = place_of(root)
    flip_in_the_header(place)
    with pytest.raises(LoaderError, match=rf"train image {place.key} of train-000002: it does not decode: ") as found:
        through_loader(open_train(root), shard_set)
    assert str(found.value).endswith(rebuild(root))


def test_checksums_of_another_shard_are_refused(root: Path) -> None:
    annotation = root / "train" / "train-000002.json"
    annotation.write_bytes(annotation.with_name("train-000001.json").read_bytes())
    with pytest.raises(DatasetError, match=r"train-000002\.json is about another shard than dataset\.json: .*--only"):
        open_train(root)


def test_a_loader_can_be_used_after_a_fault(root: Path, shard_set: Path) -> None:
    """The images before the fault come, whole, from the loader that met it."""
    flip_in_the_middle(place_of(root))
    reader, whole = open_train(root), open_train(shard_set)
    rgb = read_dataset(root).rgb
    loader = Loader(reader, rgb, 5, CPU, 1)
    with pytest.raises(ImageError):
        list(loader.run(centre_views(np.arange(45)).chunks(5)))
    views = list(centre_views(np.arange(FIRST)).chunks(5))
    for again, expected in zip(loader.run(views), Loader(whole, rgb, 5, CPU, 1).run(views), strict=True):
        assert torch.equal(again.images, expected.images)
        assert again.samples.tolist() == expected.samples.tolist()
