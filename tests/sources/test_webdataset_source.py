"""Another WebDataset as a source: its labels, its names, and what is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.dataset.info import read_dataset
from pipeline.dataset.split_reader import SplitReader
from pipeline.sources.files import SourceError, read_bytes
from pipeline.sources.sources import Listing, read_source
from tests.sources.test_tar_sources import tar_of


def listed(source: Path, source_val: Path | None = None) -> Listing:
    return read_source(source, source_val, 0.25, 0)


def write(path: Path, **contents: bytes) -> None:
    """A shard; its members' names are given with _ for the dot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_of({name.replace("_", ".", 1): data for name, data in contents.items()}))


def test_a_set_of_ours_keeps_its_keys_classes_and_bytes(shard_set: Path) -> None:
    listing = listed(shard_set)
    info = read_dataset(shard_set)
    assert listing.classes == tuple(label.wnid for label in info.classes)
    for split, entries in listing.splits.items():
        reader = SplitReader(shard_set, info, split)
        stored = {reader.key(i): (int(reader.labels[i]), reader.image(i).tobytes()) for i in range(len(reader))}
        assert {e.key: (e.label, read_bytes(e.path, e.offset, e.size)) for e in entries} == stored
    # Its own index and annotations are no members of its tars.
    assert not any("ignored" in note and ".jpg" in note for note in listing.notes)


def test_one_folder_of_public_shards_is_told_apart_by_names(tmp_path: Path) -> None:
    write(tmp_path / "imagenet1k-train-0000.tar", a_jpg=b"a", a_cls=b"1", a_json=b"{}")
    write(tmp_path / "imagenet1k-train-0001.tar", b_cls=b"0\n", b_JPEG=b"bb", c_png=b"ccc", c_cls=b"2")
    write(tmp_path / "imagenet1k-validation-00.tar", d_jpg=b"dddd", d_cls=b"2")
    listing = listed(tmp_path)
    assert listing.classes == ("class_0000", "class_0001", "class_0002")
    assert [(e.key, e.label, e.size) for e in listing.splits["train"]] == [
        ("class_0000_b", 0, 2),
        ("class_0001_a", 1, 1),
        ("class_0002_c", 2, 3),
    ]
    assert [(e.key, e.label) for e in listing.splits["val"]] == [("class_0002_d", 2)]
    assert listing.notes == (
        "classes without an image to validate on: 2 of 3 (class_0000, class_0001)",
        "files ignored, since their extensions are not those of images: 1 (1 .json)",
    )


def test_shards_of_one_name_are_split(tmp_path: Path) -> None:
    write(tmp_path / "x-0.tar", **{f"{i}_{end}": str(i % 2).encode() for i in range(8) for end in ("cls", "jpg")})
    assert {split: len(entries) for split, entries in listed(tmp_path).splits.items()} == {"train": 6, "val": 2}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"a_jpg": b"", "a_cls": b"0", "b_jpg": b""}, "the sample 'b' has an image and no .cls"),
        ({"a_jpg": b"", "a_cls": b"0", "b_cls": b"0"}, "the sample 'b' has a .cls and no image"),
        ({"a_jpg": b"", "a_png": b"", "a_cls": b"0"}, "holds two images of the sample 'a'"),
        ({"a_jpg": b"", "a_cls": b"cat"}, "the sample 'a' has the label b'cat': a label is a number from 0 on"),
        ({"a_jpg": b"", "a_cls": b"-1"}, "a label is a number from 0 on"),
        ({"a_jpg": b"", "a_cls": b"0", "b_jpg": b"", "b_cls": b"3"}, r"up to 3 and none of 1 \(2 are missing\)"),
        ({"a_txt": b""}, "x-0.tar holds 1 files and no image"),
    ],
)
def test_a_bad_shard_is_named(tmp_path: Path, contents: dict[str, bytes], message: str) -> None:
    write(tmp_path / "train" / "x-0.tar", **contents)
    with pytest.raises(SourceError, match=message):
        listed(tmp_path)


def test_splits_that_do_not_fit_are_named(tmp_path: Path) -> None:
    pair = {"a_jpg": b"", "a_cls": b"0", "b_jpg": b"", "b_cls": b"1"}
    write(tmp_path / "train" / "x-0.tar", **pair)
    write(tmp_path / "val" / "x-0.tar", c_jpg=b"", c_cls=b"2")
    with pytest.raises(
        SourceError, match=r"val/x-0\.tar has the label 2, which is none of its 2 classes: give shards and"
    ):
        listed(tmp_path)
    for name in ("x-0", "y-0", "z-0"):
        write(tmp_path / "mixed" / f"{name}.tar", **pair)
    with pytest.raises(SourceError, match="holds shards of 3 names, x, y, z: put those to train on into train/"):
        listed(tmp_path / "mixed")
    for name in ("a/1.jpg", "b/1.jpg"):
        (tmp_path / "folders" / name).parent.mkdir(parents=True)
        (tmp_path / "folders" / name).write_bytes(b"")
    with pytest.raises(SourceError, match="numbers its classes and --source names them"):
        listed(tmp_path / "folders", tmp_path / "val")


def test_a_damaged_description_is_named(tmp_path: Path) -> None:
    write(tmp_path / "train" / "x-0.tar", a_jpg=b"", a_cls=b"0")
    (tmp_path / "dataset.json").write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(SourceError, match=r"dataset\.json does not list classes by their wnid: remove it"):
        listed(tmp_path)
