"""Layouts that people have: each is either read rightly or refused by name, in one line that says what to do."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from jobs.shard_imagenet import ShardConfig, main
from pipeline.sources.files import SourceError
from pipeline.sources.sources import check_output
from tests.sources.layouts import A, B, C, Layout, below, class_images, image, images, listed, samples, write


def class_folders(split: str, classes: Mapping[str, range], inside: str = "") -> Layout:
    return below(split, *(below(f"{wnid}{inside}", class_images(wnid, classes[wnid])) for wnid in classes))


def flat(classes: Mapping[str, range], end: bool) -> dict[str, bytes]:
    """Images of many classes beside each other, their wnid at the beginning of their names and perhaps at the end."""
    return {
        f"{wnid}_{i}{f'_{wnid}' if end else ''}.JPEG": image(wnid, i)
        for wnid, numbers in classes.items()
        for i in numbers
    }


def parts(whole: Mapping[str, bytes], name: str, count: int) -> Layout:
    """Files dealt into tars NAME_0.tar, NAME_1.tar, ..."""
    items = list(whole.items())
    return {f"{name}_{k}.tar": dict(items[k::count]) for k in range(count)}


TRAIN, VAL = {A: range(3), B: range(3)}, {A: range(5, 6), B: range(5, 7)}
TRAIN_FOLDERS, VAL_FOLDERS = class_folders("train", TRAIN), class_folders("val", VAL)
CLASSES = {name.removeprefix("train/"): data for name, data in TRAIN_FOLDERS.items()}
TRAIN_TARS = {f"{wnid}.tar": class_images(wnid, numbers) for wnid, numbers in TRAIN.items()}
VAL_TARS = {f"{wnid}.tar": class_images(wnid, numbers) for wnid, numbers in VAL.items()}

READ_RIGHTLY: dict[str, Layout] = {
    "class folders": {**TRAIN_FOLDERS, **VAL_FOLDERS},
    "class tars": {**below("train", TRAIN_TARS), **below("val", VAL_TARS)},
    "class tars beside a folder to validate on": {**TRAIN_TARS, **VAL_FOLDERS},
    "capital letters": {
        **below("Train", {name.replace(".tar", ".TAR"): tar for name, tar in TRAIN_TARS.items()}),
        **class_folders("VALIDATION", VAL),
    },
    "ImageNet's own tars": {
        "ILSVRC2012_img_train.tar": TRAIN_TARS,
        "ILSVRC2012_img_train_t3.tar": {"x.tar": {}},
        **VAL_FOLDERS,
    },
    "a tar of each split": {"imagenet_train_2012.tar": TRAIN_FOLDERS, "val/x.tar": VAL_FOLDERS},
    "a tar of class folders": {"train.tar": CLASSES, **VAL_FOLDERS},
    "names in a tar that are not plain": {"train.tar": below("././train//.", CLASSES), **VAL_FOLDERS},
    "class tars deep in tars": {
        "train.tar": below("/".join("a" * 3000), TRAIN_TARS),
        "val.tar": below("a/val", VAL_TARS),
    },
    "Hugging Face's archives": {**parts(flat(TRAIN, end=True), "train_images", 3), "val_images.tar": flat(VAL, True)},
    "flat folders": {**below("train", flat(TRAIN, end=False)), **below("val", flat(VAL, end=True))},
    "Tiny ImageNet's folders": {**class_folders("train", TRAIN, inside="/images"), **VAL_FOLDERS},
    # Classes numbered in an order of their own, joined by their names.
    "shards": {"x-train-0.tar": samples(TRAIN, {A: 7, B: 3}), "x-val-0.tar": samples(VAL, {A: 7, B: 3})},
}


@pytest.mark.parametrize("form", READ_RIGHTLY)
def test_the_same_images_give_the_same_listing_in_any_form(tmp_path: Path, form: str) -> None:
    listing = listed(write(tmp_path / "source", READ_RIGHTLY[form]))
    # Written down without any of the program's own code.
    assert images(listing) == [
        (split, f"{wnid}_{i}", label, image(wnid, i))
        for split, classes in (("train", TRAIN), ("val", VAL))
        for label, wnid in enumerate((A, B))
        for i in classes[wnid]
    ]
    # A tar of all that is read as the folder is.
    with tarfile.open(tmp_path / "whole.tar", "w") as tar:
        tar.add(tmp_path / "source", "source")
    assert listed(tmp_path / "whole.tar").fingerprint == listing.fingerprint


PLAIN = {"1.jpg": image(1), "2.jpg": image(2)}
DOUBLED = class_folders("train/train", TRAIN)
UNREAD = "which is compressed or not whole"


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        # A folder too high, or too deep.
        ({"a/1.jpg": b"", "a/2.jpg": b""}, "holds one class, 'a', at least 2 are needed"),
        (below("a", TRAIN_FOLDERS), "a holds the folder 'train', .*: give --source .*/a$"),
        (
            {**DOUBLED, **below("val", VAL_FOLDERS)},
            r"train/train holds the folder .*: give --source \S*/train/train --source-val \S*/val/val$",
        ),
        (
            {**below("x/data/cls", TRAIN_FOLDERS), "x/boxes/cls/train/1.xml": b"", "x/a/list.txt": b""},
            "give --source .*/x/data/cls$",
        ),
        ({**TRAIN_FOLDERS, **below("val", VAL_FOLDERS)}, "give --source-val .*/val/val$"),
        (below("data", parts(flat(TRAIN, True), "train", 2)), "give --source .*/data$"),
        # What is missing.
        ({}, "holds no files and no image: give --source"),
        ({"a/1.jpg": b"", "b/1.jpg": b""}, "one image a class.*give --source-val"),
        ({"a/1.jpg": b"", "b/notes.txt": b""}, "class folder .*/b holds 1 files and no image.*add its images"),
        ({**TRAIN_FOLDERS, "val/images/1.jpg": b""}, "1 classes that .* has not, the first 'images': .*--val-labels"),
        ({**below("train", PLAIN), **VAL_FOLDERS}, "train holds images and not their classes.*: give --source a"),
        ({f"part-{k}.tar": PLAIN for k in range(3)}, "images and not their classes, which neither folders nor names"),
        # Sorting stopped half way.
        ({**TRAIN_FOLDERS, "train/n9.tar": {}}, "the class folder '.*' and the tar 'n9.tar' beside each other"),
        ({**TRAIN_FOLDERS, **VAL_FOLDERS, "val/x.JPEG": b""}, "val holds the class folder '.*' and 1 images of no"),
        ({**CLASSES, f"{A}/more/9.jpg": b""}, f"{A} holds the folder 'more', whose images would be left out: move"),
        # What cannot be read in place.
        ({**TRAIN_FOLDERS, "train/n9.tar.gz": b""}, f"train holds 'n9.tar.gz', {UNREAD}"),
        ({**below("train", TRAIN_TARS), f"train/{A}.tar.aria2": b""}, rf"train holds '.*\.tar\.aria2', {UNREAD}"),
        ({**TRAIN_FOLDERS, f"train/{A}/more.zip": b""}, f"holds 'more.zip', {UNREAD}"),
        ({**class_folders("train", TRAIN, "/images"), f"train/{A}/x.zip": b""}, f"{A} holds 'x.zip', {UNREAD}"),
        ({"x.tar": {**below("x", CLASSES), "more.zip": b""}}, f"x.tar holds 'more.zip', {UNREAD}"),
        ({**TRAIN_FOLDERS, "val.tar.gz": b""}, "holds 'val.tar.gz', which .*, or move it away, or give --source-val"),
        ({**parts(flat(TRAIN, True), "train", 2), "train_2.tar.gz": b""}, f"holds 'train_2.tar.gz', {UNREAD}"),
        # Which split is meant.
        (
            {"train.tar": TRAIN_FOLDERS, **TRAIN_FOLDERS},
            "holds train, train.tar, .* of one split by their names: give --source",
        ),
        ({**TRAIN_FOLDERS, **VAL_FOLDERS, "Val/x/1.jpg": b""}, "holds Val, val, .*: give --source-val the one that is"),
        ({**CLASSES, **VAL_FOLDERS}, f"holds 'val' beside '{A}': give --source the folder of the"),
        ({**CLASSES, **below("test", PLAIN)}, f"holds 'test' beside '{A}': give --source"),
        # What speaks against classes.
        (
            {f"x-{k}.tar": {f"{k}{i}.{end}": b"" for i in range(3) for end in ("jpg", "json")} for k in range(2)},
            r"x-0\.tar holds a \.json for most of its images, .*: give shards with an image and its \.cls",
        ),
        ({**CLASSES, f"{A}/{B}_9.JPEG": b""}, f"{A} holds '{B}_9.JPEG', which .* belongs to {B}"),
        (
            {**below("x", class_images(A), class_images(B)), **below("y", class_images(A))},
            f"y holds '{A}_0.JPEG', which .*/x: move it",
        ),
        ({"x.tar": class_images(A), "y.tar": {**class_images(B), **class_images(A)}}, f"y.tar holds '{A}_0.JPEG', .*x"),
        ({"caf\udce9/1.jpg": b"", "b/1.jpg": b""}, r"the class 'caf\\udce9', a name that is not UTF-8: rename it"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_a_layout_that_is_not_understood_is_refused(tmp_path: Path, layout: Layout, message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        listed(write(tmp_path, layout))
    assert "\n" not in str(caught.value)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="missing does not exist: give --source a folder of class folders, a tar"):
        listed(tmp_path / "missing")
    with pytest.raises(SourceError, match=r"nowhere does not exist: give --source-val"):
        listed(write(tmp_path, CLASSES), tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(SourceError, match=r"pipe\.tar is neither a folder nor a file: give --source a folder"):
        listed(tmp_path / "pipe.tar")


@pytest.mark.parametrize("name", [f"train/{C}", f"train/{C}.tar", f"train/{A}/more", "val"])
def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path, TRAIN_FOLDERS)
    (tmp_path / name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(SourceError, match=f"{name} is a link that leads nowhere: repair or remove it"):
        listed(tmp_path)


@pytest.mark.parametrize("output", ["source", "source/train/a/out", "link/out"])
def test_an_output_in_the_source_is_refused(tmp_path: Path, output: str) -> None:
    source = write(tmp_path / "source", TRAIN_FOLDERS)
    (tmp_path / "link").symlink_to(source / "train")
    with pytest.raises(SourceError, match=r"--output .* lies in --source .*: give --output a folder outside of it"):
        main(ShardConfig(output=str(tmp_path / output), source=str(source)))
    for place in (source, f"file://{source}"):
        with pytest.raises(SourceError, match="lies in --source-val"):
            check_output(tmp_path / output, tmp_path / "x", place)
    check_output(tmp_path / "source2", source, tmp_path / "source" / "train")
