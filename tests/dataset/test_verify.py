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
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from jobs.verify_shards import VerifyConfig, VerifyError
from jobs.verify_shards import main as verify
from pipeline.dataset.annotation import read_annotation
from pipeline.dataset.info import DatasetError, read_dataset, write_json
from pipeline.dataset.sample_index import describe_index, open_index, pack_index, record_batch, shard_rows
from pipeline.dataset.split_reader import SplitReader
from pipeline.dataset.verify import ShardReport, check_set, check_shard
from pipeline.images.rgb_stats import RgbMoments
from pipeline.sharding.pack import pack
from pipeline.sharding.shard_set import find_finished
from pipeline.sharding.shards import build_shard
from pipeline.staging.staging import stage
from tests.photographs import encoded, photograph, write_source
from tests.shard_sets import make, planned, read_index

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


def annotate(root: Path, **changes: Any) -> None:
    path = tar(root).with_suffix(".json")
    write_json(path, dataclasses.replace(read_annotation(path), **changes).to_json())


def samples_of(root: Path) -> list[tuple[str, int, bytes]]:
    """Key, label and image of each of the damaged shard's samples."""
    with tarfile.open(tar(root)) as archive:
        read = [archive.extractfile(member).read() for member in archive]  # type: ignore[union-attr]
        keys = [name.removesuffix(".cls") for name in archive.getnames()[0::2]]
    return [(key, int(label), jpeg) for key, label, jpeg in zip(keys, read[0::2], read[1::2], strict=True)]


def repack(root: Path, samples: list[tuple[str, int, bytes]]) -> None:
    """Writes the shard anew of other samples, with an index and digests that fit: what only the contents betray."""
    info = read_dataset(root)
    data, index = pack(samples)
    tar(root).write_bytes(data)
    tar(root).with_suffix(".idx").write_text(index)
    paths = [root / "train" / f"{row.name}.tar" for row in info.splits["train"].shards]
    write_index(root, [shard_rows(path.read_bytes(), path.with_suffix(".idx").read_text()) for path in paths])
    value = read_dataset(root).to_json()
    row = next(row for row in value["splits"]["train"]["shards"] if row["name"] == NAME)
    value["splits"]["train"]["bytes"] += len(data) - row["bytes"]
    row.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    write_json(root / "dataset.json", value)
    annotate(root, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def write_index(root: Path, shards: list[pa.RecordBatch]) -> None:
    """Writes a sample index of these rows, for which dataset.json vouches."""
    info, packed = read_dataset(root), pack_index(shards)
    (root / "train.arrow").write_bytes(packed)
    train = describe_index(info.splits["train"], packed)
    write_json(root / "dataset.json", dataclasses.replace(info, splits={**info.splits, "train": train}).to_json())


def test_a_whole_set_has_no_fault(whole: Path) -> None:
    assert faults(whole, decode=True) == []
    per_class = np.sum([report.per_class for report in reports(whole, True) if report.split == "train"], axis=0)
    assert per_class.tolist() == [5, 5, 5]


def test_a_set_with_a_shard_of_bad_images_alone_is_whole_without_its_tar(images: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(images, tmp_path / "images"))
    for entry in [*planned(source).shards[1].entries, planned(source).shards[2].entries[0]]:
        Path(entry.path).write_bytes(b"")
    plan = planned(source)
    output = make(tmp_path / "out", plan, max_bad_fraction=1.0)
    assert not tar(output).exists()
    assert read_annotation(output / "train" / f"{NAME}.json").samples == 0
    info = read_dataset(output)
    assert (info.set_aside, len(SplitReader(output, info, "train"))) == (5, 10)
    assert find_finished(output, plan) == info
    assert build_shard(output, plan.shards[1], plan.image, set_aside=True).kept
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
    samples = samples_of(damaged)
    other = next(i for i, sample in enumerate(samples) if sample[1] != samples[0][1])
    for i, label in ((0, samples[other][1]), (other, samples[0][1])):
        samples[i] = (samples[i][0], label, samples[i][2])
    repack(damaged, samples)
    found = faults(damaged, decode=True)
    assert len(found) == 2
    assert all("which its key does not begin with" in fault for fault in found)


@pytest.mark.parametrize(
    ("jpeg", "decodes"),
    [
        (encoded(photograph(1, 256, 255)), False),
        (encoded(Image.new("L", (256, 256))), False),
        (encoded(photograph(1, 256, 256))[:3000], False),
        (encoded(photograph(1, 256, 256)), True),
    ],
    ids=["size", "gray", "cut", "another"],
)
def test_an_image_that_is_not_the_sets_is_found_even_where_all_digests_fit(
    damaged: Path, jpeg: bytes, decodes: bool
) -> None:
    samples = samples_of(damaged)
    samples[1] = (*samples[1][:2], jpeg)
    repack(damaged, samples)
    found = faults(damaged, decode=True)
    assert found[-1] == f"{NAME}: the moments of its pixels are not those of its annotation"
    wrong = f"{NAME} {samples[1][0]}: its image is not a complete baseline color JPEG"
    assert [fault.startswith(wrong) for fault in found[:-1]] == [True] * (not decodes)


def test_a_key_in_two_shards_is_found(damaged: Path) -> None:
    key = read_index(damaged / "train" / "train-000000.idx")[0]["jpg"][2].removesuffix(".jpg")
    samples = samples_of(damaged)
    samples[0] = (key, int(key[1]), samples[0][2])
    repack(damaged, samples)
    assert faults(damaged) == [f"{NAME}: it holds a sample's key that another sample has, too"]


def rewrite_rows(root: Path, **values: object) -> None:
    """Gives the damaged shard's second sample other values in the sample index."""
    (batch,) = pa.ipc.open_file(root / "train.arrow").read_all().to_batches()
    columns = {name: batch[name].to_pylist() for name in batch.schema.names}
    sample = columns["shard"].index(1) + 1
    for name, value in values.items():
        columns[name][sample] = value if name != "label" else (columns[name][sample] + 1) % 3
    rows = record_batch(*columns.values())
    # Four samples to a shard.
    write_index(root, [rows.slice(start, 4) for start in range(0, len(rows), 4)])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"offset": 512}, "the sample index gives it another offset than its tar"),
        ({"size": 9}, "the sample index gives it another size than its tar"),
        ({"label": "another"}, "the sample index gives it another label than its tar"),
        ({"crc32": 7}, "its image's bytes are not those that the sample index vouches for"),
        ({"key": "n0_other"}, "the sample index gives its samples other keys than its tar"),
    ],
)
def test_an_index_that_does_not_fit_the_tars_is_found(damaged: Path, values: dict[str, object], message: str) -> None:
    key = second_sample(damaged)[0]
    rewrite_rows(damaged, **values)
    assert faults(damaged) == [f"{NAME}: {message}" if "key" in values else f"{NAME} {key}: {message}"]


def test_a_missing_or_changed_index_is_found(damaged: Path) -> None:
    data = (damaged / "train.arrow").read_bytes()
    (damaged / "train.arrow").write_bytes(data[:-1] + b"X")
    (found,) = faults(damaged)
    assert found.startswith(f"{damaged}/train.arrow is damaged") or "sha256 of train.arrow" in found
    assert "run the command that made the set" in found
    (damaged / "train.arrow").unlink()
    (found,) = faults(damaged)
    assert found.startswith(f"{damaged}/train.arrow is missing: run the command that made the set again")


def rewrite(extension: str, alter: Callable[[str], str]) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        path = tar(root).with_suffix(extension)
        path.write_text(alter(path.read_text()))

    return damage


def annotated(**changes: Any) -> Callable[[Path], None]:
    return lambda root: annotate(root, **changes)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: os.truncate(tar(root), 20000), "its tar cannot be read to its end"),
        (lambda root: change(tar(root), second_sample(root)[1] - 512, b"\xff"), "its tar cannot be read to its end"),
        (lambda root: tar(root).unlink(), "its tar is missing"),
        (lambda root: tar(root).with_suffix(".idx").unlink(), "its index is missing"),
        (rewrite(".idx", lambda text: text.replace(" 512 1 ", " 513 1 ")), "its index says"),
        (rewrite(".idx", lambda text: text[: text.rindex("\n", 0, -1) + 1]), "its index has 3 lines for 4 samples"),
        (lambda root: tar(root).with_suffix(".json").unlink(), "its annotation is missing"),
        (rewrite(".json", lambda text: "{}"), "its annotation cannot be read"),
        (
            annotated(moments=RgbMoments.of(np.zeros((4 * 256, 256, 3), np.uint8))),
            "the RGB statistics in dataset.json are not those of the shards' moments",
        ),
        (annotated(sha256="0" * 64), "its annotation says sha256 0000"),
        (annotated(rgb=None), "its annotation's RGB statistics are not those of dataset.json"),
        (annotated(inputs="0", moments=RgbMoments()), "its annotation's moments are of 0 pixels"),
    ],
)
def test_damage_is_named(damaged: Path, damage: Callable[[Path], None], message: str) -> None:
    """What is printed beside it mends it: `tests.sharding.test_shard_job`."""
    damage(damaged)
    found = faults(damaged, decode=True)
    assert any(message in fault for fault in found), found
    # The shard is named, or at least the set; no other shard is.
    assert all(NAME in fault or "train-" not in fault for fault in found)


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


def test_a_staged_copy_is_not_checked_in_place_of_its_set(whole: Path, tmp_path: Path) -> None:
    """It lacks what only other readers and the sharding need."""
    staged = stage(str(whole), tmp_path, lambda _: None)
    with pytest.raises(VerifyError, match=f"{staged} is a copy for training, staged from {whole}: check that one"):
        verify(VerifyConfig(str(staged)))
