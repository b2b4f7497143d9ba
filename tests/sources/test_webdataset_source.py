"""Another WebDataset as a source: its labels, its names, and what is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.dataset.info import read_dataset
from pipeline.dataset.split_reader import SplitReader
from pipeline.sources.files import SourceError, read_bytes
from tests.sources.layouts import A, B, Layout, below, class_images, listed, samples, write

TRAIN, VAL = {A: range(3), B: range(3)}, {A: range(5, 6), B: range(5, 7)}
SHARD, OTHER = samples(TRAIN, {A: 0, B: 1}), samples(VAL, {A: 1, B: 0})
PAIR: Layout = {"a.jpg": b"", "a.cls": b"0", "b.jpg": b"", "b.cls": b"1"}


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
    layout: Layout = {
        "imagenet1k-train-0000.tar": {"a.jpg": "a", "a.cls": "1", "a.json": "{}"},
        "imagenet1k-train-0001.tar": {"b.cls": "0\n", "b.JPEG": "bb", "c.png": "ccc", "c.cls": "2"},
        "imagenet1k-validation-00.tar": {"d.jpg": "dddd", "d.cls": "2"},
    }
    listing = listed(write(tmp_path, layout))
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


def test_shards_of_one_name_are_split_and_may_hold_more_pictures_than_images(tmp_path: Path) -> None:
    more = {f"{A}_0.seg.png": b"mask", f"{A}_1.depth.png": b"depth"}
    listing = listed(write(tmp_path, {"x-0.tar": {**samples({A: range(4), B: range(4)}, {A: 0, B: 1}), **more}}))
    assert {split: len(entries) for split, entries in listing.splits.items()} == {"train": 6, "val": 2}
    assert listing.notes[-1].endswith("2 (1 .seg.png, 1 .depth.png)")


@pytest.mark.parametrize(
    ("key", "note"),
    [
        ("ILSVRC2012_val_{i:08d}", '{"label": 0, "filename": "%(wnid)s/ILSVRC2012_val_%(i)08d.JPEG"}'),
        ("ILSVRC2012_val_{i:08d}", '{"wnid": "%(wnid)s"}'),
        ("{wnid}/ILSVRC2012_val_{i:08d}", ""),
        ("ILSVRC2012_val_{i:08d}_{wnid}", ""),
        ("{wnid}/ILSVRC2012_val_{i:08d}", "[" * 100_000),
    ],
)
def test_classes_are_called_what_keys_or_json_say(tmp_path: Path, key: str, note: str) -> None:
    classes = {A: range(1, 3), B: range(3, 6)}
    folders = below("train", below(A, class_images(A)), below(B, class_images(B)))
    listing = listed(write(tmp_path, {"val.tar": samples(classes, {A: 1, B: 0}, key, note), **folders}))
    found = [(entry.key, entry.wnid) for entry in listing.splits["val"]]
    assert found == [(f"{wnid}_ILSVRC2012_val_{i:08d}", wnid) for wnid, numbers in classes.items() for i in numbers]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        # Samples.
        ({"x.tar": {**PAIR, "c.jpg": b""}}, "x.tar: the sample 'c' has an image and no .cls"),
        ({"x.tar": {**PAIR, "c.cls": b"0"}}, "the sample 'c' has a .cls and no image"),
        ({"x.tar": {**PAIR, "a.png": b""}}, "holds two images of the sample 'a'"),
        ({"x.tar": {**PAIR, "a.cls": b"cat"}}, "the sample 'a' has the label b'cat': a label is a number from 0 on"),
        ({"x.tar": {**PAIR, "b.cls": b"3"}}, r"up to 3 and none of 1 \(2 are missing\)"),
        ({"x.tar": {**SHARD, "22.0.cls": "0"}}, "'22.0.cls': in a WebDataset the first dot .* here '22'"),
        ({"x.tar": {**SHARD, "big.cls": bytes(10**6)}}, "'big.cls' has 1,000,000 bytes: a label is"),
        # Shards beside each other.
        ({f"train-{k:02d}.tar": SHARD for k in (0, 1, 3)}, r"not train-02\.tar: download it, or name"),
        ({f"train-{k:02d}.tar": SHARD for k in (2, 3)}, r"up to train-03.tar, and not train-01\.tar"),
        ({f"x-{k:05d}-of-00003.tar": SHARD for k in (0, 1)}, r"and not x-00002-of-00003\.tar"),
        ({"train-0.tar": SHARD, "train-1.tar": {"1.jpg": b""}}, "train-1.tar holds no .cls, as the shards beside"),
        ({f"{name}-0.tar": PAIR for name in "xyz"}, "holds shards of 3 names, x, y, z: put those to train on into"),
        # Classes.
        ({"x-0.tar": SHARD, "x-1.tar": OTHER}, f"give {A} the labels 0 and 1"),
        (
            {"train-0.tar": SHARD, "val-0.tar": OTHER},
            r"val-0\.tar gives .* the label ., which elsewhere is .*: give training and validation shards",
        ),
        (
            {"dataset.json": json.dumps({"classes": [{"wnid": B}, {"wnid": A}]}), "x-0.tar": SHARD},
            r"x-0\.tar gives .* the label ., which elsewhere is",
        ),
        (
            {"dataset.json": '{"classes": [{"wnid": "crane"}, {"wnid": "crane"}]}', "x-0.tar": PAIR},
            r"dataset\.json gives two classes one wnid: name the classes apart",
        ),
        ({"dataset.json": "[" * 100_000, "x-0.tar": SHARD}, "dataset.json does not list classes"),
        ({"dataset.json": '{"schema_version": 99}', "train/x-0.tar": PAIR}, "list classes by their wnid: remove it"),
        (
            {"train/x-0.tar": PAIR, "val/x-0.tar": {"c.jpg": b"", "c.cls": b"2"}},
            r"val/x-0\.tar has the label 2, which is none of its 2 classes: give shards and",
        ),
        (
            {"train/a/1.jpg": b"", "train/b/1.jpg": b"", "val/x-0.tar": PAIR},
            "numbers its classes and --source names them",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_shards_that_are_not_whole_or_of_one_set_are_refused(tmp_path: Path, layout: Layout, message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        listed(write(tmp_path, layout))
    assert "\n" not in str(caught.value)
