"""Checking a set: every kind of damage is found, named by shard and sample, and mended to the same bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from jobs.verify_shards import VerifyConfig, VerifyError
from jobs.verify_shards import main as verify
from pipeline.dataset.annotation import ShardAnnotation, read_annotation
from pipeline.dataset.info import DatasetError, read_dataset, write_json
from pipeline.dataset.sample_index import describe_index, open_index, pack_index, record_batch, shard_rows
from pipeline.dataset.split_reader import SplitReader
from pipeline.dataset.verify import ShardReport, check_set, check_shard
from pipeline.images.rgb_stats import RgbMoments
from pipeline.sharding.pack import pack
from pipeline.sharding.shard_set import find_finished
from pipeline.staging.staging import stage
from tests.photographs import encoded, photograph, write_source
from tests.shard_sets import contents, make, planned, read_index

NAME = "train-000001"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "images", images=6, longest=280)


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("whole") / "out", planned(images))


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Path:
    """A copy to spoil: 15 training images, four to a shard, and 3 to validate on."""
    return Path(shutil.copytree(whole, tmp_path / "out"))


def reports(root: Path, decode: bool) -> list[ShardReport]:
    info = read_dataset(root)
    reports = []
    for split, part in info.splits.items():
        try:
            index = open_index(root, split, part, len(info.classes))
        except DatasetError:
            index = None
        for number, row in enumerate(part.shards):
            reports.append(
                check_shard(root, split, row, index.part(number) if index is not None else None, info, decode)
            )
    return reports


def faults(root: Path, decode: bool = False) -> list[str]:
    found = reports(root, decode)
    return [str(f) for report in found for f in report.faults] + [
        str(f) for f in check_set(root, read_dataset(root), found)
    ]


def tar(root: Path) -> Path:
    return root / "train" / f"{NAME}.tar"


def change(path: Path, place: int, to: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[place : place + len(to)] = to
    path.write_bytes(data)


def second_sample(root: Path) -> tuple[str, int, int]:
    """Key and offsets of the label and of the image of the damaged shard's second sample."""
    sample = read_index(tar(root).with_suffix(".idx"))[1]
    return sample["jpg"][2].removesuffix(".jpg"), sample["cls"][0], sample["jpg"][0]


def annotate(root: Path, alter: Callable[[ShardAnnotation], ShardAnnotation]) -> None:
    path = tar(root).with_suffix(".json")
    write_json(path, alter(read_annotation(path)).to_json())


def repack(root: Path, alter: Callable[[list[tuple[str, int, bytes]]], None]) -> None:
    """Writes the shard anew with other samples, an index and digests that fit: what only the contents betray."""
    info = read_dataset(root)
    with tarfile.open(tar(root)) as archive:
        read = [archive.extractfile(member).read() for member in archive]  # type: ignore[union-attr]
        keys = [name.removesuffix(".cls") for name in archive.getnames()[0::2]]
    samples = [(key, int(label), jpeg) for key, label, jpeg in zip(keys, read[0::2], read[1::2], strict=True)]
    alter(samples)
    data, index = pack(samples)
    tar(root).write_bytes(data)
    tar(root).with_suffix(".idx").write_text(index)
    paths = [root / "train" / f"{row.name}.tar" for row in info.splits["train"].shards]
    packed = pack_index([shard_rows(path.read_bytes(), path.with_suffix(".idx").read_text()) for path in paths])
    (root / "train.arrow").write_bytes(packed)
    train = describe_index(info.splits["train"], packed)
    value = dataclasses.replace(info, splits={**info.splits, "train": train}).to_json()
    row = next(row for row in value["splits"]["train"]["shards"] if row["name"] == NAME)
    value["splits"]["train"]["bytes"] += len(data) - row["bytes"]
    row.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    write_json(root / "dataset.json", value)
    annotate(root, lambda a: dataclasses.replace(a, bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))


@pytest.mark.parametrize("decode", [False, True])
def test_a_whole_set_has_no_fault(whole: Path, decode: bool) -> None:
    assert faults(whole, decode) == []
    info = read_dataset(whole)
    per_class = np.sum([report.per_class for report in reports(whole, decode) if report.split == "train"], axis=0)
    reader = SplitReader(whole, info, "train")
    assert per_class.tolist() == np.bincount(reader.labels, minlength=3).tolist() == [5, 5, 5]


def test_a_whole_set_with_bad_images_has_no_fault(images: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(images, tmp_path / "images"))
    for entry in [*planned(source).shards[1].entries, planned(source).shards[2].entries[0]]:
        Path(entry.path).write_bytes(b"")
    output = make(tmp_path / "out", planned(source), max_bad_fraction=1.0)
    assert not (output / "train" / f"{NAME}.tar").exists()
    assert read_dataset(output).set_aside == 5
    assert faults(output, decode=True) == []


def test_a_flipped_byte_is_traced_to_its_image(damaged: Path) -> None:
    key, _, jpeg = second_sample(damaged)
    change(tar(damaged), jpeg + 2000, bytes([tar(damaged).read_bytes()[jpeg + 2000] ^ 1]))
    found = faults(damaged)
    assert len(found) == 2
    assert found[0].startswith(f"{NAME}: the sha256 of its tar is ")
    assert found[1] == f"{NAME} {key}: its image's bytes are not those that the sample index vouches for"


def test_a_flipped_label_is_traced_to_its_sample(damaged: Path) -> None:
    key, label, _ = second_sample(damaged)
    now = int(chr(tar(damaged).read_bytes()[label]))
    change(tar(damaged), label, str((now + 1) % 3).encode())
    wrong = f"its label is {(now + 1) % 3}, class n{(now + 1) % 3}, which its key does not begin with"
    assert faults(damaged)[1:] == [f"{NAME} {key}: {wrong}"]
    change(tar(damaged), label, b"7")
    assert f"{NAME} {key}: its label is b'7', the set has 3 classes" in faults(damaged)


def test_swapped_labels_are_found_even_where_all_digests_fit(damaged: Path) -> None:
    def swap(samples: list[tuple[str, int, bytes]]) -> None:
        other = next(i for i, sample in enumerate(samples) if sample[1] != samples[0][1])
        for i, label in ((0, samples[other][1]), (other, samples[0][1])):
            samples[i] = (samples[i][0], label, samples[i][2])

    repack(damaged, swap)
    found = faults(damaged, decode=True)
    assert len(found) == 2
    assert all("which its key does not begin with" in fault for fault in found)


@pytest.mark.parametrize(
    "jpeg",
    [
        encoded(photograph(1, 256, 255)),
        encoded(Image.new("L", (256, 256))),
        encoded(photograph(1, 256, 256))[:3000],
        encoded(photograph(1, 256, 256), "PNG"),
    ],
    ids=["size", "gray", "cut", "PNG"],
)
def test_an_image_that_is_not_the_sets_is_found(damaged: Path, jpeg: bytes) -> None:
    key = second_sample(damaged)[0]

    def replace(samples: list[tuple[str, int, bytes]]) -> None:
        samples[1] = (*samples[1][:2], jpeg)

    repack(damaged, replace)
    found = faults(damaged, decode=True)
    assert any(fault.startswith(f"{NAME} {key}: its image is not a complete baseline color JPEG") for fault in found)
    assert f"{NAME}: the moments of its pixels are not those of its annotation" in found
    assert all(fault.startswith(NAME) for fault in found)


def test_another_image_is_found_where_all_but_the_moments_fit(damaged: Path) -> None:
    def replace(samples: list[tuple[str, int, bytes]]) -> None:
        samples[1] = (*samples[1][:2], encoded(photograph(1, 256, 256)))

    repack(damaged, replace)
    assert faults(damaged, decode=True) == [f"{NAME}: the moments of its pixels are not those of its annotation"]


def rewrite_rows(root: Path, **values: object) -> None:
    """Gives the damaged shard's second sample other values in the sample index, which dataset.json vouches for."""
    info = read_dataset(root)
    (batch,) = pa.ipc.open_file(root / "train.arrow").read_all().to_batches()
    columns = {name: batch[name].to_pylist() for name in batch.schema.names}
    rows = record_batch(*columns.values())
    first = columns["shard"].index(1)
    for name, value in values.items():
        columns[name][first + 1] = value
    rows = record_batch(*columns.values())
    counts = [row.samples for row in info.splits["train"].shards]
    starts = np.cumsum([0, *counts[:-1]]).tolist()
    packed = pack_index([rows.slice(start, count) for start, count in zip(starts, counts, strict=True)])
    (root / "train.arrow").write_bytes(packed)
    train = describe_index(info.splits["train"], packed)
    write_json(root / "dataset.json", dataclasses.replace(info, splits={**info.splits, "train": train}).to_json())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"offset": 512}, "the sample index gives it another offset than its tar"),
        ({"size": 9}, "the sample index gives it another size than its tar"),
        ({"crc32": 7}, "its image's bytes are not those that the sample index vouches for"),
        ({"key": "n0_other"}, "the sample index gives its samples other keys than its tar"),
    ],
)
def test_an_index_that_does_not_fit_the_tars_is_found(damaged: Path, values: dict[str, object], message: str) -> None:
    key = second_sample(damaged)[0]
    rewrite_rows(damaged, **values)
    assert faults(damaged) == [f"{NAME}: {message}" if "key" in values else f"{NAME} {key}: {message}"]


def test_another_label_in_the_index_is_found(damaged: Path) -> None:
    key = second_sample(damaged)[0]
    reader = SplitReader(damaged, read_dataset(damaged), "train")
    rewrite_rows(damaged, label=(int(reader.labels[reader.index.of_shard(1).start + 1]) + 1) % 3)
    assert faults(damaged) == [f"{NAME} {key}: the sample index gives it another label than its tar"]


def test_a_missing_or_changed_index_is_found(damaged: Path) -> None:
    data = (damaged / "train.arrow").read_bytes()
    (damaged / "train.arrow").write_bytes(data[:-1] + b"X")
    (found,) = faults(damaged)
    assert found.startswith(f"{damaged}/train.arrow is damaged") or "sha256 of train.arrow" in found
    assert "run the command that made the set" in found
    (damaged / "train.arrow").unlink()
    (found,) = faults(damaged)
    assert found.startswith(f"{damaged}/train.arrow is missing: run the command that made the set again")


def cut(root: Path) -> None:
    tar(root).write_bytes(tar(root).read_bytes()[:20000])


def lose_tar(root: Path) -> None:
    tar(root).unlink()


def rewrite(extension: str, alter: Callable[[str], str]) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        path = tar(root).with_suffix(extension)
        path.write_text(alter(path.read_text()))

    return damage


def annotated(alter: Callable[[ShardAnnotation], ShardAnnotation]) -> Callable[[Path], None]:
    return lambda root: annotate(root, alter)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "its tar cannot be read to its end"),
        (lambda root: os.truncate(tar(root), second_sample(root)[1] - 512), "its tar cannot be read to its end"),
        (lambda root: change(tar(root), second_sample(root)[1] - 512, b"\xff"), "its tar cannot be read to its end"),
        (lose_tar, "its tar is missing"),
        (lambda root: tar(root).with_suffix(".idx").unlink(), "its index is missing"),
        (rewrite(".idx", lambda text: text.replace(" 512 1 ", " 513 1 ")), "its index says"),
        (rewrite(".idx", lambda text: text[: text.rindex("\n", 0, -1) + 1]), "its index has 3 lines for 4 samples"),
        (lambda root: tar(root).with_suffix(".json").unlink(), "its annotation is missing"),
        (rewrite(".json", lambda text: "{}"), "its annotation cannot be read"),
        (
            annotated(lambda a: dataclasses.replace(a, moments=dataclasses.replace(a.moments, sums=(1, 2, 3)))),
            "the RGB statistics in dataset.json are not those of the shards' moments",
        ),
        (annotated(lambda a: dataclasses.replace(a, sha256="0" * 64)), "its annotation says sha256 0000"),
        (
            annotated(lambda a: dataclasses.replace(a, rgb=None)),
            "its annotation's RGB statistics are not those of dataset.json",
        ),
        (
            annotated(lambda a: dataclasses.replace(a, inputs="0", moments=RgbMoments())),
            "its annotation's moments are of 0 pixels",
        ),
    ],
)
def test_damage_is_named_and_mended_by_the_same_command(
    images: Path, whole: Path, damaged: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(damaged)
    found = faults(damaged, decode=True)
    assert any(message in fault for fault in found), found
    # The shard is named, or at least the set; no other shard is.
    assert all(NAME in fault or "train-" not in fault for fault in found)
    others = {path: path.stat().st_mtime_ns for path in damaged.rglob("*.tar") if NAME not in path.name}
    for path in (damaged / "train").glob(f"{NAME}.*"):
        path.unlink()
    plan = planned(images)
    assert find_finished(damaged, plan) is None
    make(damaged, plan)
    assert contents(damaged) == contents(whole)
    assert {path: path.stat().st_mtime_ns for path in others} == others


def test_what_only_the_set_tells_is_found(damaged: Path) -> None:
    (damaged / "train" / "train-000009.tar").write_bytes(b"stray")
    (damaged / "rejects.jsonl").write_text('{"path": "x"}\n')
    value = json.loads((damaged / "dataset.json").read_text())
    value["splits"]["val"]["samples"] = 99
    value["rgb"]["mean"][0] += 0.01
    write_json(damaged / "dataset.json", value)
    found = "\n".join(faults(damaged))
    assert "dataset.json says 99 samples of val, its shards sum to 3" in found
    assert "train-000009.tar is no part of the set: remove it" in found
    assert "rejects.jsonl lists 1 images that were set aside, for dataset.json it is 0" in found
    assert "the RGB statistics in dataset.json are not those of the shards' moments" in found


def test_a_key_in_two_shards_is_found(damaged: Path) -> None:
    key = read_index(damaged / "train" / "train-000000.idx")[0]["jpg"][2].removesuffix(".jpg")

    def copy(samples: list[tuple[str, int, bytes]]) -> None:
        samples[0] = (key, int(key[1]), samples[0][2])

    repack(damaged, copy)
    assert faults(damaged) == [f"{NAME}: it holds a sample's key that another sample has, too"]


@pytest.mark.parametrize("damage", [cut, lose_tar])
def test_readers_name_the_command_that_mends(damaged: Path, damage: Callable[[Path], None]) -> None:
    damage(damaged)
    cure = rf"rm {damaged}/train/{NAME}\.\* && python jobs/shard_imagenet.py --source IMAGES --output {damaged}$"
    with pytest.raises(DatasetError, match=cure):
        SplitReader(damaged, read_dataset(damaged), "train")


def test_a_staged_copy_is_not_checked_in_place_of_its_set(whole: Path, tmp_path: Path) -> None:
    """It lacks what only other readers and the sharding need."""
    staged = stage(str(whole), tmp_path, lambda _: None)
    with pytest.raises(VerifyError, match=f"{staged} is a copy for training, staged from {whole}: check that one"):
        verify(VerifyConfig(str(staged)))
