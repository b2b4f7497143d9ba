"""Sets made elsewhere that cannot be used as they are: each refused by name, with its tars and folder untouched."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs.shard_imagenet import ShardConfig
from pipeline.annotate import MAX_FAULTS, annotate_shard
from pipeline.annotated_set import find_shards
from pipeline.annotation import read_annotation
from pipeline.dataset import read_dataset
from pipeline.shard_set import ShardSetError
from pipeline.source_files import SourceError
from pipeline.verify import check_shard
from tests.foreign_shards import WNIDS, annotate, contents, described, digests, sample, stored, write_set, write_shards
from tests.photographs import encoded, photograph

EXIF_ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("foreign") / "set")


@pytest.fixture
def root(foreign: Path, tmp_path: Path) -> Path:
    """A set in which nothing is wrong yet, in a folder whose name a shell would split."""
    return Path(shutil.copytree(foreign, tmp_path / "my set"))


def turned() -> bytes:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    return stored(1, exif=exif.tobytes())


def cmyk() -> bytes:
    return encoded(Image.fromarray(photograph(1, 256, 256)).convert("CMYK"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cls": None}, r"it has n02102040_1\.jpg: one \.jpg and one \.cls must follow each other"),
        ({"jpg": None}, r"it has n02102040_1\.cls: one \.jpg"),
        ({"jpeg": stored(1)}, r"it has n02102040_1\.cls, n02102040_1\.jpeg, n02102040_1\.jpg: one \.jpg"),
        ({"jpg": None, "png": encoded(photograph(1, 256, 256), "PNG")}, r"it has .*\.png: one \.jpg"),
        ({"jpg": encoded(photograph(1, 256, 224))}, "it is 256 x 224 RGB, not 256 x 256 RGB"),
        ({"jpg": cmyk()}, "it is 256 x 256 CMYK, not 256 x 256 RGB"),
        ({"jpg": encoded(photograph(1, 256, 256), "PNG")}, "it is no JPEG$"),
        ({"jpg": stored(1)[:2000]}, "it does not decode: .*truncated"),
        ({"jpg": b""}, "it is no JPEG$"),
        ({"jpg": turned()}, r"its EXIF says that it is to be turned \(6\)"),
        ({"cls": b"cat"}, "its label is 'cat', a label is a number below 100,000"),
        ({"cls": b"-1"}, "its label is '-1', a label is a number"),
        ({"cls": b""}, "its label is '', a label is a number"),
        ({"cls": b"100000"}, "its label is '100000', a label is a number below"),
        ({"cls": b"9" * 5000}, "its label is '9{20}', a label is a number below"),
        ({"__key__": "a key"}, "its name holds white space, which DALI's index cannot"),
    ],
)
def test_a_bad_sample_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    samples = [sample(0), sample(1, **changes), sample(2)]
    for split in ("train", "val"):
        write_shards(tmp_path, split, [sample(number) for number in range(3)])
    write_shards(tmp_path, "val", samples)
    before = contents(tmp_path)
    info, (fault,) = annotate(tmp_path)
    assert info is None
    assert re.match(rf"val/val-000000 {changes.get('__key__', 'n02102040_1')}: {message}", fault)
    # The good shards are done, and the bad one is as it was.
    assert set(contents(tmp_path)) - set(before) == {"train/train-000000.idx", "train/train-000000.json"}
    assert {name: contents(tmp_path)[name] for name in before} == before


def test_a_set_of_other_images_is_refused_at_its_first(root: Path) -> None:
    write_shards(root, "val", [sample(number, jpg=encoded(photograph(number, 300, 224))) for number in range(3)])
    before = contents(root)
    with pytest.raises(
        ShardSetError, match=r"val-000000\.tar begins with n01440764_0, and it is 300 x 224 RGB"
    ) as found:
        annotate(root)
    # A command that a shell takes as it is meant.
    assert str(found.value).endswith(f"python jobs/shard_imagenet.py --source '{root}' --output OTHER")
    assert contents(root) == before


def test_only_some_of_very_many_faults_are_told(tmp_path: Path) -> None:
    for what in ({"cls": None}, {"cls": b"cat"}):
        write_shards(tmp_path, "train", [sample(number, **what) for number in range(40)], per_shard=100)
        faults = annotate_shard(tmp_path, "train", "train-000000", None).faults
        assert len(faults) == MAX_FAULTS + 1
        assert faults[-1].what == "more of it may be wrong: the rest was not read"


# Tars.


def cut(tar: Path) -> None:
    tar.write_bytes(tar.read_bytes()[:30_000])


def empty(tar: Path) -> None:
    tar.write_bytes(b"")


def without_samples(tar: Path) -> None:
    with tarfile.open(tar, "w"):
        pass


def with_a_link(tar: Path) -> None:
    with tarfile.open(tar, "a") as archive:
        link = tarfile.TarInfo("n01440764_99.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "n01440764_0.jpg"
        archive.addfile(link)


def with_an_index(tar: Path) -> None:
    tar.with_suffix(".idx").write_text("v1.2 1\njpg 512 9 a.jpg\n")


def with_a_note(tar: Path) -> None:
    tar.with_suffix(".json").write_text('{"count": 6}')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, "train/train-000001: its tar cannot be read to its end: .*download or copy it again"),
        (empty, "train/train-000001: its tar is empty: copy it again"),
        (without_samples, "train/train-000001: its tar holds no sample: remove it"),
        (with_a_link, "train/train-000001: its tar cannot be read to its end: .*holds the link"),
        (with_an_index, r"train/train-000001: beside it lies another program's train-000001\.idx.*move it away"),
        (with_a_note, "train/train-000001: beside it lies a file that is no annotation of this program.*move it away"),
    ],
)
def test_a_bad_tar_is_named(spoil: Callable[[Path], None], message: str, root: Path) -> None:
    spoil(root / "train" / "train-000001.tar")
    before = contents(root)
    info, faults = annotate(root)
    assert info is None
    assert re.match(message, faults[0])
    assert all(fault.startswith("train/train-000001") for fault in faults)
    assert {name: contents(root)[name] for name in before} == before
    assert not (root / "dataset.json").exists()


@pytest.mark.parametrize("same_size", [True, False])
def test_a_tar_that_changed_since_is_not_described_as_it_was(same_size: bool, root: Path) -> None:
    described(root)
    tar = root / "val" / "val-000001.tar"
    old = tar.read_bytes()
    changed = old.replace(stored(107), stored(106)[:1000] + stored(107)[1000:]) if same_size else old + bytes(10240)
    assert (len(changed) == len(old), changed != old) == (same_size, True)
    tar.write_bytes(changed)
    before = contents(root)
    assert annotate(root) == (
        None,
        [
            "val/val-000001: its tar has changed since it was annotated: bring it back, or remove val-000001.json to "
            "take it as it is"
        ],
    )
    assert contents(root) == before
    # Both cures.
    tar.write_bytes(old)
    assert described(root) == read_dataset(root)
    write_shards(root / "more", "val", [sample(number) for number in (200, 201, 202)])
    shutil.move(root / "more" / "val" / "val-000000.tar", tar)
    tar.with_suffix(".json").unlink()
    tar.with_suffix(".idx").unlink()
    described(root)
    assert read_annotation(tar.with_suffix(".json")).sha256 == digests(root)["val/val-000001.tar"]


# What no shard tells by itself.


def test_keys_that_are_there_twice_are_named(root: Path) -> None:
    write_shards(root / "again", "train", [sample(0, __key__="N01440764_0"), sample(31), sample(32)])
    shutil.move(root / "again" / "train" / "train-000000.tar", root / "train" / "train-000009.tar")
    assert annotate(root)[1] == ["train/train-000009: it holds a sample's key that another sample has, too"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ((0, 1, 3), r"has training labels up to 3 \(of n03888257_2 in train-000000\), but none of 2 \(1 are missing\)"),
        ((1, 2, 3), r"has training labels up to 3 .*, but none of 0 \(1 are missing\)"),
        ((0, 0, 0), "has one class, at least 2 are needed"),
    ],
)
def test_training_labels_have_no_gap(labels: tuple[int, ...], message: str, tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_shards(tmp_path, split, [sample(number, cls=label) for number, label in enumerate(labels)])
    with pytest.raises(ShardSetError, match=message):
        annotate(tmp_path)
    assert not (tmp_path / "dataset.json").exists()


def test_a_label_beyond_the_classes_is_named(root: Path, tmp_path: Path) -> None:
    write_shards(root, "val", [sample(number, cls=number) for number in range(4)])
    _, faults = annotate(root)
    assert faults == ["val/val-000000 n01440764_3: its label is 3, and there are 3 classes"]
    given = tmp_path / "classes.txt"
    given.write_text("n01440764\nn02102040\n")
    _, faults = annotate(root, given)
    assert "train/train-000000 n03888257_2: its label is '2', --classes names 2" in faults


def test_splits_and_files_that_number_the_classes_otherwise_are_refused(root: Path, tmp_path: Path) -> None:
    write_shards(root, "val", [sample(number, cls=2 - number) for number in range(3)])
    (root / "val" / "val-000001.tar").unlink()
    with pytest.raises(ShardSetError, match=f"val: the label 0 is {WNIDS[0]} .*, but its samples say {WNIDS[2]}"):
        annotate(root)
    given = tmp_path / "classes.txt"
    given.write_text("\n".join([WNIDS[1], WNIDS[0], WNIDS[2]]))
    with pytest.raises(ShardSetError, match=rf"train: the label 0 is {WNIDS[1]} \(as in .*\), but .* say {WNIDS[0]}"):
        annotate(root, given)
    assert not (root / "dataset.json").exists()


def test_one_label_for_images_of_several_wnids(root: Path) -> None:
    mixed = [*map(sample, range(200, 206)), sample(206, cls=1)]
    write_shards(root, "val", mixed)
    with pytest.raises(ShardSetError, match=f"val: the label 1 is {WNIDS[1]} .*, but its samples say several"):
        annotate(root)
    # Where training images do so, the class is not what any of the wnids says, as one of all dogs.
    write_shards(root, "train", [*map(sample, range(6)), sample(300, cls=1)], per_shard=7)
    for path in root.glob("train/train-000000.[ij]*"):
        path.unlink()
    assert [label.wnid for label in described(root).classes] == ["class_0000", "class_0001", "class_0002"]


@pytest.mark.parametrize("text", ["", "n01440764\n", "n01440764 a\n\nn02102040 b\n", "n01440764 a\nn01440764 b\n"])
def test_a_list_of_classes_that_is_none_is_refused(text: str, root: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(SourceError, match=r"classes\.txt has . lines with . wnids: give one line for each"):
        annotate(root, tmp_path / "classes.txt")


# Folders.


@pytest.mark.parametrize(
    "names", [("train-", "val-"), ("imagenet1k-train-", "imagenet1k-validation-"), ("train_", "val")]
)
def test_the_printed_command_mends_a_flat_folder(names: tuple[str, str], root: Path) -> None:
    for split, name in zip(("train", "val"), names, strict=True):
        for number, tar in enumerate(sorted((root / split).glob("*.tar"))):
            tar.rename(root / f"{name}{number:04d}.tar")
        (root / split).rmdir()
    before = set(digests(root).values())
    with pytest.raises(ShardSetError, match=r"has no train/\*\.tar: put the tars to train on into train/") as found:
        find_shards(root)
    subprocess.run(["bash", "-c", str(found.value).partition("into val/: ")[2]], check=True)
    assert [split for split, _ in find_shards(root)] == ["train"] * 3 + ["val"] * 2
    assert set(digests(root).values()) == before
    described(root)


def test_shards_numbered_in_two_ways_are_all_moved(root: Path) -> None:
    for split in ("train", "val"):
        for number, tar in enumerate(sorted((root / split).glob("*.tar"))):
            tar.rename(root / f"{split}{'-_'[number % 2]}{number}.tar")
    with pytest.raises(ShardSetError) as found:
        find_shards(root)
    subprocess.run(["bash", "-c", str(found.value).partition("into val/: ")[2]], check=True)
    assert [split for split, _ in find_shards(root)] == ["train"] * 3 + ["val"] * 2


def test_splits_that_names_do_not_tell_are_left_to_the_user(root: Path) -> None:
    for tar in root.glob("train/*.tar"):
        tar.rename(root / tar.name.removeprefix("train-"))
    with pytest.raises(ShardSetError, match=r"those to validate on into val/$"):
        find_shards(root)


def test_both_splits_may_use_the_same_names(root: Path) -> None:
    for split in ("train", "val"):
        for tar in (root / split).glob("*.tar"):
            tar.rename(tar.with_name(tar.name.removeprefix(f"{split}-")))
    info = described(root)
    index = root / "val" / "000001.idx"
    index.write_text(index.read_text().replace("v1.2 3", "v1.2 4"))
    (row,) = info.splits["val"].shards[1:]
    (fault,) = check_shard(root, "val", row, info, decode=False).faults
    assert str(fault).startswith("val/000001: its index begins with 'v1.2 4'")
    (root / "val" / "000001.tar").write_bytes(b"")
    assert annotate(root)[1] == ["val/000001: its tar is empty: copy it again"]


def test_sets_that_need_no_annotation_are_refused(shard_set: Path, root: Path) -> None:
    with pytest.raises(ShardSetError, match="was sharded by this program and lacks nothing: check it with python"):
        find_shards(shard_set)
    (root / "unfinished.json").write_text("{}")
    with pytest.raises(ShardSetError, match="holds a set that sharding has not finished: run that command again"):
        find_shards(root)
    (root / "unfinished.json").unlink()
    (root / "dataset.json").write_text("{}")
    with pytest.raises(ShardSetError, match=r"cannot be used: .*; or move it away"):
        find_shards(root)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"annotate_only": True, "source": "images"}, "--annotate-only changes no image, so leave out --source"),
        ({"annotate_only": True, "quality": 80}, "leave out --quality"),
        ({"annotate_only": True, "only": ("train-000000",)}, "leave out --only"),
        ({"source": "images", "classes": Path("classes.txt")}, "--classes is for --annotate-only"),
        ({}, "give --source IMAGES, or --annotate-only"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardConfig(output=Path("out"), **options)


def test_the_photographs_differ() -> None:
    """Without it, images swapped in these tests would go unnoticed."""
    decoded = [np.asarray(Image.open(io.BytesIO(stored(number)))) for number in range(3)]
    assert not np.array_equal(decoded[0], decoded[1])
    assert not np.array_equal(decoded[1], decoded[2])
