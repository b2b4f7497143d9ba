"""Layouts that people have: each is either read rightly or refused by name, in one line that says what to do."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from jobs.shard_imagenet import ShardConfig, main
from pipeline.sources.files import SourceError
from pipeline.sources.sources import Listing, check_output, read_source
from tests.sources.test_tar_sources import tar_of

A, B, C = "n00000001", "n00000002", "n00000003"
Layout = Mapping[str, "bytes | str | Layout"]
"""Files, and tars as the layouts that they hold."""


def image(*place: object) -> bytes:
    """Listing reads no images: their bytes need only tell them apart."""
    return " ".join(map(str, place)).encode()


def contents(layout: Layout) -> dict[str, bytes]:
    return {
        name: content
        if isinstance(content, bytes)
        else content.encode()
        if isinstance(content, str)
        else packed(content)
        for name, content in layout.items()
    }


def packed(layout: Layout) -> bytes:
    return tar_of(contents(layout))


def write(root: Path, layout: Layout) -> Path:
    for name, data in contents(layout).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def class_folder(wnid: str, numbers: range = range(3), inside: str = "") -> Layout:
    return {f"{wnid}/{inside}{wnid}_{i}.JPEG": image(wnid, i) for i in numbers}


def class_tar(wnid: str, numbers: range = range(3)) -> Layout:
    return {f"{wnid}_{i}.JPEG": image(wnid, i) for i in numbers}


def below(folder: str, *layouts: Layout) -> Layout:
    return {f"{folder}/{name}": content for layout in layouts for name, content in layout.items()}


def listed(source: Path | str, val: Path | None = None, labels: Path | None = None) -> Listing:
    return read_source(source, val, 0.34, 0, labels)


def comparable(listing: Listing) -> list[tuple[str, str, str, int]]:
    return [(split, e.key, e.wnid, e.size) for split, entries in listing.splits.items() for e in entries]


def expected(train: Mapping[str, range], val: Mapping[str, range]) -> list[tuple[str, str, str, int]]:
    """What a listing of images WNID_NUMBER is to hold, written down without any of the program's own code."""
    splits = {"train": train, "val": val}
    return [
        (split, f"{wnid}_{i}", wnid, len(image(wnid, i)))
        for split, classes in splits.items()
        for wnid in sorted(classes)
        for i in classes[wnid]
    ]


TRAIN, VAL = {A: range(3), B: range(3)}, {A: range(5, 6), B: range(5, 7)}
TRAIN_FOLDERS = below("train", *(class_folder(wnid, numbers) for wnid, numbers in TRAIN.items()))
VAL_FOLDERS = below("val", *(class_folder(wnid, numbers) for wnid, numbers in VAL.items()))
TRAIN_TARS = {f"{wnid}.tar": class_tar(wnid, numbers) for wnid, numbers in TRAIN.items()}
VAL_TARS = {f"{wnid}.tar": class_tar(wnid, numbers) for wnid, numbers in VAL.items()}


def flat(classes: Mapping[str, range], end: bool) -> dict[str, bytes]:
    """Images of many classes beside each other, their wnid at the beginning of their names and perhaps at the end."""
    return {
        f"{wnid}_{i}{f'_{wnid}' if end else ''}.JPEG": image(wnid, i)
        for wnid, numbers in classes.items()
        for i in numbers
    }


def samples(classes: Mapping[str, range], labels: Mapping[str, int], key: str = "{wnid}_{i}", note: str = "") -> Layout:
    parts: dict[str, bytes | str] = {}
    for wnid, numbers in classes.items():
        for i in numbers:
            name = key.format(wnid=wnid, i=i)
            parts |= {f"{name}.cls": str(labels[wnid]), f"{name}.jpg": image(wnid, i)}
            if note:
                parts[f"{name}.json"] = note % {"wnid": wnid, "i": i}
    return parts


def parts(whole: Mapping[str, bytes], name: str, count: int) -> Layout:
    """Files dealt into tars NAME_0.tar, NAME_1.tar, ..."""
    items = list(whole.items())
    return {f"{name}_{k}.tar": dict(items[k::count]) for k in range(count)}


# Read rightly.


@pytest.mark.parametrize(
    "layout",
    [
        {**TRAIN_FOLDERS, **VAL_FOLDERS},
        {
            name.replace("train", "Train").replace("val", "VALIDATION"): data
            for name, data in {**TRAIN_FOLDERS, **VAL_FOLDERS}.items()
        },
        {**below("train", TRAIN_TARS), **below("val", VAL_TARS)},
        {
            **below("train", {name.replace(".tar", ".TAR"): tar for name, tar in TRAIN_TARS.items()}),
            **below("val", VAL_TARS),
        },
        {"ILSVRC2012_img_train.tar": TRAIN_TARS, "ILSVRC2012_img_train_t3.tar": {"x.tar": {}}, **VAL_FOLDERS},
        {"train.tar": TRAIN_FOLDERS, "val.tar": VAL_FOLDERS},
        {"imagenet_train_2012.tar": TRAIN_FOLDERS, "val/x.tar": VAL_FOLDERS},
        {"train.tar": {name.removeprefix("train/"): data for name, data in TRAIN_FOLDERS.items()}, **VAL_FOLDERS},
        {
            "train.tar": below("././train//.", {n.removeprefix("train/"): d for n, d in TRAIN_FOLDERS.items()}),
            **VAL_FOLDERS,
        },
        {"train.tar": below("/".join("a" * 3000), TRAIN_TARS), **VAL_FOLDERS},
        {"train.tar": below("a/train", TRAIN_TARS), "val.tar": below("a/val", VAL_TARS)},
        {**parts(flat(TRAIN, end=True), "train_images", 3), "val_images.tar": flat(VAL, end=True)},
        {**below("train", flat(TRAIN, end=False)), **below("val", flat(VAL, end=True))},
        {**below("train", *(class_folder(w, n, "images/") for w, n in TRAIN.items())), **VAL_FOLDERS},
        {"x-train-0.tar": samples(TRAIN, {A: 0, B: 1}), "x-val-0.tar": samples(VAL, {A: 0, B: 1})},
        # Classes numbered in an order of their own, joined by their names.
        {"x-train-0.tar": samples(TRAIN, {A: 7, B: 3}), "x-val-0.tar": samples(VAL, {A: 7, B: 3})},
    ],
    ids=lambda layout: ",".join(name[:12] for name in layout),
)
def test_the_same_images_give_the_same_listing_in_any_form(
    tmp_path: Path, layout: Layout, request: pytest.FixtureRequest
) -> None:
    listing = listed(write(tmp_path / "source", layout))
    assert comparable(listing) == expected(TRAIN, VAL)
    with io.BytesIO() as buffer:
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            tar.add(tmp_path / "source", "source")
        (tmp_path / "whole.tar").write_bytes(buffer.getvalue())
    # A tar of all that is read as the folder is.
    assert listed(tmp_path / "whole.tar").fingerprint == listing.fingerprint


WDS_NOTE = '{"label": 0, "filename": "%(wnid)s/ILSVRC2012_val_%(i)08d.JPEG"}'


@pytest.mark.parametrize(
    ("key", "note"),
    [
        ("ILSVRC2012_val_{i:08d}", WDS_NOTE),
        ("ILSVRC2012_val_{i:08d}", '{"wnid": "%(wnid)s"}'),
        ("{wnid}/ILSVRC2012_val_{i:08d}", ""),
        ("ILSVRC2012_val_{i:08d}_{wnid}", ""),
        ("{wnid}/ILSVRC2012_val_{i:08d}", "[" * 100_000),
        ("{wnid}/ILSVRC2012_val_{i:08d}", "no json"),
    ],
)
def test_a_webdatasets_classes_are_called_what_its_keys_or_json_say(tmp_path: Path, key: str, note: str) -> None:
    classes = {A: range(1, 3), B: range(3, 6)}
    layout = {"val.tar": samples(classes, {A: 1, B: 0}, key, note), **TRAIN_FOLDERS}
    listing = listed(write(tmp_path, layout))
    found = [(entry.key, entry.wnid) for entry in listing.splits["val"]]
    assert found == [(f"{wnid}_ILSVRC2012_val_{i:08d}", wnid) for wnid, numbers in classes.items() for i in numbers]


def test_a_sample_may_have_other_pictures_than_its_image(tmp_path: Path) -> None:
    more = {f"{A}_0.seg.png": b"mask", f"{A}_1.depth.png": b"depth"}
    listing = listed(write(tmp_path, {"x-0.tar": {**samples(TRAIN, {A: 0, B: 1}), **more}}))
    assert listing.images == 6
    assert listing.notes[-1].endswith("2 (1 .seg.png, 1 .depth.png)")


# Refused by name.

PLAIN = {"1.jpg": image(1), "2.jpg": image(2)}


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (below("a/train", class_folder(A), class_folder(B)), "a holds the folder 'train', .*: give --source .*/a$"),
        (
            {
                **below("train/train", class_folder(A), class_folder(B)),
                **below("val/val", class_folder(A), class_folder(B)),
            },
            r"train/train holds the folder .*: give --source \S*/train/train --source-val \S*/val/val$",
        ),
        (
            {**below("x/data/cls", TRAIN_FOLDERS), "x/boxes/cls/train/1.xml": b"", "x/a/list.txt": b""},
            "give --source .*/x/data/cls$",
        ),
        ({**TRAIN_FOLDERS, "val/images/1.jpg": b""}, "1 classes that .* has not, the first 'images': .*--val-labels"),
        ({**TRAIN_FOLDERS, **below("val/val", class_folder(A), class_folder(B))}, "give --source-val .*/val/val$"),
        (below("data", parts(flat(TRAIN, True), "train", 2)), "give --source .*/data$"),
        (
            {**below("train", PLAIN), **VAL_FOLDERS},
            "train holds images and not their classes.*: give --source a folder",
        ),
        # Sorting stopped half way.
        (
            {**TRAIN_FOLDERS, "train/n9.tar": class_tar("n9")},
            "the class folder '.*' and the tar 'n9.tar' beside each other",
        ),
        (
            {**TRAIN_FOLDERS, **VAL_FOLDERS, "val/x.JPEG": b""},
            "val holds the class folder '.*' and 1 images of no class",
        ),
        ({**TRAIN_FOLDERS, "train/n9.tar.gz": b""}, "train holds 'n9.tar.gz', which is compressed or not whole"),
        (
            {**below("train", TRAIN_TARS), "train/n9.tar.part": b""},
            "train holds 'n9.tar.part', which is compressed or not",
        ),
        (
            {**below("train", TRAIN_TARS), f"train/{A}.tar.aria2": b""},
            r"train holds '.*\.tar\.aria2', which is compressed or",
        ),
        ({**TRAIN_FOLDERS, f"train/{A}/more.zip": b""}, "holds 'more.zip', which is compressed or not whole"),
        (
            {**TRAIN_FOLDERS, "val.tar.gz": b""},
            "holds 'val.tar.gz', which .*, or move it away, or give --source-val",
        ),
        (
            {**parts(flat(TRAIN, True), "train", 2), "train_2.tar.gz": b""},
            "holds 'train_2.tar.gz', which is compressed",
        ),
        (
            {"train.tar": TRAIN_FOLDERS, **TRAIN_FOLDERS},
            "holds train, train.tar, .* of one split by their names: give --source",
        ),
        (
            {**TRAIN_FOLDERS, **VAL_FOLDERS, "Val/x/1.jpg": b""},
            "holds Val, val, .*: give --source-val the one that is meant",
        ),
        (
            {**class_folder(A), **class_folder(B), **VAL_FOLDERS},
            f"holds 'val' beside '{A}': give --source the folder of the",
        ),
        ({**class_folder(A), **class_folder(B), **below("test", PLAIN)}, f"holds 'test' beside '{A}': give --source"),
        # What speaks against classes.
        (
            {**class_folder(A), **class_folder(B), f"{A}/{B}_9.JPEG": b""},
            f"{A} holds '{B}_9.JPEG', which .* belongs to {B}",
        ),
        (
            {**below("x", class_tar(A), class_tar(B)), **below("y", class_tar(A))},
            f"y holds '{A}_0.JPEG', which .*/x: move it",
        ),
        (
            {f"part-{k}.tar": PLAIN for k in range(3)},
            "holds images and not their classes, which neither folders nor names",
        ),
        ({f"{k:05d}.tar": {**PLAIN, "1.json": "{}"} for k in range(3)}, "holds images and not their classes"),
        (
            {"x.tar": class_tar(A), "y.tar": {**class_tar(B), **class_tar(A)}},
            f"y.tar holds '{A}_0.JPEG', which .*x.tar",
        ),
        # Shards.
        (
            {f"train-{k:02d}.tar": samples(TRAIN, {A: 0, B: 1}) for k in (0, 1, 3)},
            r"not train-02\.tar: download it, or name",
        ),
        (
            {f"train-{k:02d}.tar": samples(TRAIN, {A: 0, B: 1}) for k in (2, 3)},
            r"up to train-03.tar, and not train-01\.tar",
        ),
        ({f"x-{k:05d}-of-00003.tar": samples(TRAIN, {A: 0, B: 1}) for k in (0, 1)}, r"and not x-00002-of-00003\.tar"),
        (
            {"train-0.tar": samples(TRAIN, {A: 0, B: 1}), "train-1.tar": PLAIN},
            "train-1.tar holds no .cls, as the shards beside",
        ),
        (
            {"x-0.tar": {**samples(TRAIN, {A: 0, B: 1}), "22.0.cls": "0"}},
            "'22.0.cls': in a WebDataset the first dot .* here '22'",
        ),
        (
            {"x-0.tar": {**samples(TRAIN, {A: 0, B: 1}), "big.cls": b"0" * 10**6}},
            "'big.cls' has 1,000,000 bytes: a label is",
        ),
        (
            {"x-0.tar": samples(TRAIN, {A: 0, B: 1}), "x-1.tar": samples(VAL, {A: 1, B: 0})},
            f"give {A} the labels 0 and 1",
        ),
        (
            {"train-0.tar": samples(TRAIN, {A: 0, B: 1}), "val-0.tar": samples(VAL, {A: 1, B: 0})},
            r"val-0\.tar gives .* the label ., which elsewhere is .*: give training and validation shards",
        ),
        (
            {
                "dataset.json": json.dumps({"classes": [{"wnid": B}, {"wnid": A}]}),
                "x-0.tar": samples(TRAIN, {A: 0, B: 1}),
            },
            r"x-0\.tar gives .* the label ., which elsewhere is",
        ),
        (
            {"dataset.json": "[" * 100_000, "x-0.tar": samples(TRAIN, {A: 0, B: 1})},
            "dataset.json does not list classes",
        ),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_a_layout_that_is_not_understood_is_refused(tmp_path: Path, layout: Layout, message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        listed(write(tmp_path, layout))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [f"train/{C}", f"train/{C}.tar", f"train/{A}/more", "val"])
def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path, TRAIN_FOLDERS)
    (tmp_path / name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(SourceError, match=f"{name} is a link that leads nowhere: repair or remove it"):
        listed(tmp_path)


def test_a_class_without_validation_images_is_named(tmp_path: Path) -> None:
    write(tmp_path, {**TRAIN_FOLDERS, **below("train", class_folder(C)), **VAL_FOLDERS})
    assert listed(tmp_path).notes == (f"classes without an image to validate on: 1 of 3 ({C})",)


@pytest.mark.parametrize("output", ["source", "source/out", "source/train/a/out", "link/out"])
def test_an_output_in_the_source_is_refused(tmp_path: Path, output: str) -> None:
    source = write(tmp_path / "source", TRAIN_FOLDERS)
    (tmp_path / "link").symlink_to(source / "train")
    with pytest.raises(SourceError, match=r"--output .* lies in --source .*: give --output a folder outside of it"):
        check_output(tmp_path / output, source, None)
    with pytest.raises(SourceError, match="lies in --source-val"):
        check_output(tmp_path / output, tmp_path / "x", source)
    check_output(tmp_path / "source2", source, tmp_path / "source" / "train")
    with pytest.raises(SourceError, match="lies in --source"):
        main(ShardConfig(output=str(tmp_path / output), source=str(source)))


# Labels by name.

ROWS = [("ILSVRC2012_val_00000002", B), ("ILSVRC2012_val_00000001", A), ("ILSVRC2012_val_00000003", B)]


@pytest.mark.parametrize(
    ("text", "notes"),
    [
        ("ImageId,PredictionString\n" + "".join(f"{name},{wnid} 1 2 3 4 {wnid} 5 6 7 8 \n" for name, wnid in ROWS), 0),
        ("".join(f"{name}.JPEG {wnid}\n" for name, wnid in ROWS), 0),
        ("".join(f"val/{name}.JPEG {int(wnid == B)}\n" for name, wnid in ROWS), 1),
        ("".join(f"{name}.JPEG\t{wnid}\t0\t1\t2\t3\r\n" for name, wnid in ROWS), 0),
        ("".join(f'"{name}.JPEG","{wnid}"\n' for name, wnid in [*ROWS, ("other", A)]), 1),
        (f"{A}\n{B}\n{B}\n", 0),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_labels_are_joined_by_name_where_names_are_given(tmp_path: Path, text: str, notes: int, encoding: str) -> None:
    write(tmp_path, {**TRAIN_FOLDERS, **{f"val/{name}.JPEG": name for name, _ in ROWS}})
    (tmp_path / "labels").write_text(text, encoding)
    listing = listed(tmp_path, labels=tmp_path / "labels")
    found = {Path(entry.path).stem: entry.wnid for entry in listing.splits["val"]}
    assert found == dict(ROWS)
    assert len(listing.notes) == notes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            f"ILSVRC2012_val_00000001 {A}\n" * 2,
            "has no row for 2 of the 3 images in .*val, the first 'ILSVRC2012_val_00000002'",
        ),
        (f"x {A}\nx {B}\n", f"gives 'x' two labels, '{A}' and 'x {B}': list each image once"),
        ("".join(f"{name} 1\n" for name, _ in ROWS), "holds numbers: .*--val-synsets"),
        ("".join(f"{name} {int(wnid == B) * 2}\n" for name, wnid in ROWS), "holds numbers: .*--val-synsets"),
        (f"x {A}\ny dog\n", "row 2 of .* is 'dog', which is no class of --source: give"),
        (f"x {A}\ny {'9' * 5000}\n", "row 2 of .* is '9999.*', which is no class of --source: give"),
        (f"{A}\n{B}\n".encode("utf-16-le").decode("latin-1"), "is no text in UTF-8"),
    ],
    ids=lambda value: value[:40],
)
def test_labels_by_name_that_do_not_fit_are_refused(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, {**TRAIN_FOLDERS, **{f"val/{name}.JPEG": name for name, _ in ROWS}})
    (tmp_path / "labels").write_bytes(os.fsencode(text))
    with pytest.raises(SourceError, match=message) as caught:
        listed(tmp_path, labels=tmp_path / "labels")
    assert "\n" not in str(caught.value)
