"""Checking a set: every kind of damage is found, and named by shard and sample.

What is printed beside it mends it: `tests.sharding.test_shard_job`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from jobs.verify_shards import VerifyConfig, VerifyError, _settings
from jobs.verify_shards import main as verify
from pipeline.dataset.annotation import read_annotation
from pipeline.dataset.info import read_dataset, rebuild_advice, write_json
from pipeline.dataset.sample_index import shard_rows
from pipeline.dataset.split_reader import SplitReader
from pipeline.dataset.verify import ShardReport, check_set, check_shard, open_indexes
from pipeline.images.rgb_stats import RgbMoments
from pipeline.sharding.pack import pack
from pipeline.sharding.shard_set import find_finished
from pipeline.staging.staging import stage
from tests.damage import Place, edit_dataset, flip_bit, overwrite, places, rewrite_index, write_index
from tests.photographs import encoded, photograph
from tests.shard_sets import build_shard, contents, make, planned

NAME = "train-000001"  # The shard that is damaged.
SAMPLE = 5  # Of the training split: the second of that shard's four.
wds2idx = importlib.import_module("wds2idx")  # DALI's own indexer, which comes without types.


@pytest.fixture
def damaged(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to spoil: 15 training images, four to a shard, and 3 to validate on. Its pictures stay."""
    monkeypatch.setattr("pipeline.sharding.shard_set.write_contact_sheet", lambda *_: None)
    return Path(shutil.copytree(whole, tmp_path / "out"))


@pytest.fixture
def place(damaged: Path) -> Place:
    """Of the sample that is damaged."""
    return places(damaged, "train")[SAMPLE]


def reports(root: Path, decode: bool) -> list[ShardReport]:
    info, found = read_dataset(root), []
    indexes, _ = open_indexes(root, info)
    for split, part in info.splits.items():
        for number, row in enumerate(part.shards):
            rows = indexes[split].part(number) if split in indexes else None
            found.append(check_shard(root, split, row, rows, info, decode))
    return found


def faults(root: Path, decode: bool = False) -> list[str]:
    found, info = reports(root, decode), read_dataset(root)
    indexes, damaged = open_indexes(root, info)
    whole = [*damaged, *check_set(root, info, indexes, found)]
    return [str(fault) for fault in (*(fault for report in found for fault in report.faults), *whole)]


def file(root: Path, extension: str) -> Path:
    """Of the damaged shard."""
    return root / "train" / f"{NAME}.{extension}"


def annotate(root: Path, **changes: Any) -> None:
    path = file(root, "json")
    write_json(path, dataclasses.replace(read_annotation(path), **changes).to_json())


Samples = list[tuple[str, int, bytes]]


def repack(root: Path, alter: Callable[[Samples], object]) -> None:
    """Writes the shard anew of other samples, with an index and digests that fit: what only the contents betray."""
    samples = [(place.key, place.number, place.jpeg) for place in places(root, "train")[4:8]]
    alter(samples)
    data, index = pack(samples)
    file(root, "tar").write_bytes(data)
    file(root, "idx").write_text(index)
    vouch(root)


def vouch(root: Path) -> None:
    """Gives the set's descriptions the rows and digests of the shard as it is now."""
    data = file(root, "tar").read_bytes()
    tars = sorted((root / "train").glob("*.tar"))
    write_index(root, [shard_rows(path.read_bytes(), path.with_suffix(".idx").read_text()) for path in tars])
    stated = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    annotate(root, **stated)

    def describe(value: dict[str, Any]) -> None:
        train = value["splits"]["train"]
        train["shards"][1].update(stated)
        train["bytes"] = sum(row["bytes"] for row in train["shards"])

    edit_dataset(root, describe)


def test_a_whole_set_has_no_fault(whole: Path) -> None:
    assert faults(whole, decode=True) == []


def test_a_set_with_a_shard_of_bad_images_alone_is_whole_without_its_tar(images: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(images, tmp_path / "images"))
    for entry in [*planned(source).shards[1].entries, planned(source).shards[2].entries[0]]:
        Path(entry.path).write_bytes(b"")
    plan = planned(source)
    output = make(tmp_path / "out", plan)
    assert not file(output, "tar").exists()
    assert read_annotation(file(output, "json")).samples == 0
    info = read_dataset(output)
    assert (info.set_aside, len(SplitReader(output, info, "train"))) == (5, 10)
    assert find_finished(output, plan) == info
    assert build_shard(output, plan.shards[1], plan.image).kept
    assert faults(output, decode=True) == []


# What is traced to a sample.


def test_every_flipped_bit_is_found_and_one_in_an_image_is_traced_to_it(damaged: Path) -> None:
    """In a header, a label or what lies between, the shard alone is named."""
    found = places(damaged, "train")[4:8]
    draw = np.random.default_rng(0)
    offsets = [at for place in found for at in (place.label, place.image - 500, place.image)]
    offsets += draw.integers(0, file(damaged, "tar").stat().st_size, 30).tolist()
    for offset in offsets:
        flip_bit(file(damaged, "tar"), offset, bit := int(draw.integers(8)))
        digest, *images = faults(damaged)
        assert digest.startswith(f"{NAME}: the sha256 of its tar is ")
        assert images == [
            f"{NAME} {place.key}: its image's bytes are not those that the sample index vouches for"
            for place in found
            if place.image <= offset < place.image + place.size
        ]
        flip_bit(file(damaged, "tar"), offset, bit)
    for path in (file(damaged, "idx"), damaged / "train.arrow"):
        for offset in draw.integers(0, path.stat().st_size, 60).tolist():
            flip_bit(path, offset, bit := int(draw.integers(8)))
            assert len(faults(damaged)) == 1
            flip_bit(path, offset, bit)
    assert faults(damaged) == []


def test_a_wrong_label_is_found_where_all_digests_fit(damaged: Path, place: Place) -> None:
    repack(damaged, lambda samples: samples.insert(1, (place.key, (place.number + 1) % 3, samples.pop(1)[2])))
    (found,) = faults(damaged, decode=True)
    assert found.startswith(f"{NAME} {place.key}: its label is ")


def test_a_label_beyond_the_classes_is_found_without_the_sample_index(damaged: Path, place: Place) -> None:
    repack(damaged, lambda samples: samples.insert(1, (place.key, 7, samples.pop(1)[2])))
    (damaged / "train.arrow").unlink()
    assert f"{NAME} {place.key}: its label is 7, the set has 3 classes" in faults(damaged)


def test_a_key_in_two_shards_is_found(damaged: Path) -> None:
    key = places(damaged, "train")[0].key
    repack(damaged, lambda samples: samples.insert(0, (key, int(key[1]), samples.pop(0)[2])))
    assert faults(damaged) == [f"{NAME}: it holds a sample's key that another sample has, too"]


def test_a_key_twice_in_a_shard_is_named(damaged: Path, place: Place) -> None:
    repack(damaged, lambda samples: samples.append((*samples[1][:2], samples.pop()[2])))
    found, twice = faults(damaged)
    assert found == f"{NAME}: its samples cannot be read: {place.key}.cls does not follow the other parts of its sample"
    assert twice == f"{NAME}: it holds a sample's key that another sample has, too"


def test_images_are_decoded_without_the_sample_index(damaged: Path, place: Place) -> None:
    repack(damaged, lambda samples: samples.insert(1, (*samples.pop(1)[:2], encoded(photograph(1, 256, 255)))))
    (damaged / "train.arrow").unlink()
    assert any(fault.startswith(f"{NAME} {place.key}: its image is not a compl") for fault in faults(damaged, True))


def test_a_shard_that_another_library_wrote_is_checked_alike(damaged: Path) -> None:
    """With the image first, parts that nobody reads, and names that take a second header."""
    samples = [(f"{place.key}_{'x' * 150}", place.number, place.jpeg) for place in places(damaged, "train")[4:8]]
    with webdataset.TarWriter(str(file(damaged, "tar"))) as writer:
        writer.tarstream.addfile(tarfile.TarInfo(".hidden.txt"))
        writer.tarstream.add(damaged / "val", "folder", recursive=False)
        for key, label, jpeg in samples:
            writer.write({"__key__": key, "jpeg": jpeg, "cls": label, "json": {"a": 1}})
    with wds2idx.IndexCreator(str(file(damaged, "tar")), str(file(damaged, "idx")), verbose=False) as creator:
        creator.create_index()
    vouch(damaged)
    assert faults(damaged, decode=True) == []


def second(name: str = "n0_0.jpg", size: int = 0, kind: bytes = tarfile.REGTYPE) -> Callable[[bytes], bytes]:
    """Gives a tar another second member."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return lambda tar: tar[:1024] + member.tobuf(tarfile.GNU_FORMAT) + tar[1536:]


@pytest.mark.parametrize(
    "change",
    [
        # It leads back to the first.
        second(size=-1024),
        second(size=-512, kind=tarfile.GNUTYPE_SPARSE),
        second("../n0_0.jpg"),
        second("/n0_0.jpg"),
        second(kind=tarfile.SYMTYPE),
        lambda tar: b"",
        lambda tar: b"<html>",
        lambda tar: tar[:20000],
    ],
)
def test_a_vouched_for_tar_that_is_none_is_one_fault(damaged: Path, change: Callable[[bytes], bytes]) -> None:
    data = change(file(damaged, "tar").read_bytes())
    file(damaged, "tar").write_bytes(data)
    stated = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_dataset(damaged, lambda value: value["splits"]["train"]["shards"][1].update(stated))
    assert sum(" samples" in fault for fault in faults(damaged)) == 1


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
def test_an_image_that_is_not_the_sets_is_found_where_all_digests_fit(
    damaged: Path, place: Place, jpeg: bytes, decodes: bool
) -> None:
    repack(damaged, lambda samples: samples.insert(1, (*samples.pop(1)[:2], jpeg)))
    *images, moments = faults(damaged, decode=True)
    assert moments == f"{NAME}: the moments of its pixels are not those of its annotation"
    wrong = f"{NAME} {place.key}: its image is not a complete baseline color JPEG"
    assert [image.startswith(wrong) for image in images] == [True] * (not decodes)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("offset", 512, "the sample index gives it another offset than its tar"),
        ("size", 9, "the sample index gives it another size than its tar"),
        ("label", None, "the sample index gives it another label than its tar"),
        ("crc32", 7, "the sample index gives it another crc32 than its tar"),
        ("key", "n0_other", "the sample index gives its samples other keys than its tar"),
    ],
)
def test_an_index_that_does_not_fit_the_tars_is_found(
    damaged: Path, place: Place, column: str, value: object, message: str
) -> None:
    rewrite_index(damaged, SAMPLE, **{column: (place.number + 1) % 3 if column == "label" else value})
    assert faults(damaged) == [f"{NAME}: {message}" if column == "key" else f"{NAME} {place.key}: {message}"]


# What is named by shard or set.


def rewrite(extension: str, alter: Callable[[str], str]) -> Callable[[Path], object]:
    return lambda root: file(root, extension).write_text(alter(file(root, extension).read_text()))


def remove(extension: str) -> Callable[[Path], object]:
    return lambda root: file(root, extension).unlink()


def annotated(**changes: Any) -> Callable[[Path], object]:
    return lambda root: annotate(root, **changes)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: os.truncate(file(root, "tar"), 20000), "its tar has 20000 bytes, dataset.json says "),
        (lambda root: overwrite(file(root, "tar"), 0, b"\xff"), "the sha256 of its tar is "),
        (remove("tar"), "its tar is missing"),
        (remove("idx"), "its index is missing"),
        (rewrite("idx", lambda text: text.replace(" 512 1 ", " 513 1 ")), "its index is not that of its tar"),
        (rewrite("idx", lambda text: text[: text.rindex("\n", 0, -1) + 1]), "its index is not that of its tar"),
        (remove("json"), "its annotation is missing"),
        (rewrite("json", lambda text: "{}"), "its annotation cannot be read"),
        (rewrite("json", lambda text: "[" * 99999), "its annotation cannot be read"),
        (annotated(samples=float("inf")), "its annotation cannot be read"),
        (annotated(moments=RgbMoments(1, ("a", "b", "c"))), "its annotation cannot be read"),  # type: ignore[arg-type]
        (
            annotated(moments=RgbMoments.of(np.zeros((4 * 256, 256, 3), np.uint8))),
            "the RGB statistics in dataset.json are not those of the shards' moments",
        ),
        (annotated(sha256="0" * 64), "its annotation says sha256 0000"),
        (annotated(rgb=None), "its annotation's RGB statistics are not those of dataset.json"),
        (annotated(moments=RgbMoments()), "its annotation's moments are of 0 pixels"),
    ],
)
def test_damage_of_a_shard_is_named_and_what_is_printed_repairs_it(
    images: Path, whole: Path, damaged: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(damaged)
    found = faults(damaged, decode=True)
    assert any(message in fault for fault in found), found
    # The shard is named, or at least the set; no other shard is.
    assert all(NAME in fault or "train-" not in fault for fault in found)
    _, remove, _ = re.split(": (rm .*) && ", rebuild_advice(str(damaged), "train", NAME))
    subprocess.run(remove, shell=True, check=True)
    assert contents(make(damaged, planned(images))) == contents(whole)


def test_the_command_that_repairs_deals_as_the_set_was_dealt(damaged: Path) -> None:
    """Though the one shard to validate on, which is short, alone has its annotation."""
    for annotation in (damaged / "train").glob("*.json"):
        annotation.unlink()
    assert "--samples-per-shard 4 " in _settings(read_dataset(damaged), reports(damaged, False))


def test_what_only_the_set_tells_is_found(damaged: Path) -> None:
    (damaged / "train" / "train-000009.tar").write_bytes(b"stray")
    (damaged / "rejects.jsonl").write_text('{"path": "x"}\n')
    edit_dataset(damaged, lambda value: value["splits"]["val"].update(samples=99))
    edit_dataset(damaged, lambda value: value["rgb"].update(mean=[0.5, 0.5, 0.5]))
    found = "\n".join(faults(damaged))
    assert "dataset.json says 99 samples of val, its shards sum to 3" in found
    assert "train-000009.tar is no part of the set: remove it" in found
    assert "rejects.jsonl lists 1 images that were set aside, for dataset.json it is 0" in found
    assert "the RGB statistics in dataset.json are not those of the shards' moments" in found


def test_a_missing_or_changed_index_is_found(damaged: Path) -> None:
    index = damaged / "train.arrow"
    whole = index.read_bytes()
    # Where each key ends, of four letters all; the second shard begins with the fifth.
    ends = np.arange(16, dtype=np.int32) * 4
    spoiled = np.where(ends == 16, 2**31 - 1, ends).astype(np.int32)
    assert ends.tobytes() in whole
    for changed in (whole[:-1] + b"X", whole.replace(ends.tobytes(), spoiled.tobytes())):
        index.write_bytes(changed)
        (found,) = faults(damaged)
        assert found.startswith(f"{index} is damaged") or "sha256 of train.arrow" in found
        assert "run the command that made the set" in found
    index.unlink()
    (found,) = faults(damaged)
    assert found.startswith(f"{index} is missing: run the command that made the set again")


def test_a_staged_copy_is_not_checked_in_place_of_its_set(whole: Path, tmp_path: Path) -> None:
    """It lacks what only other readers and the sharding need."""
    staged = stage(str(whole), tmp_path, lambda _: None)
    with pytest.raises(VerifyError, match=f"{staged} is a copy for training, staged from {whole}: check that one"):
        verify(VerifyConfig(str(staged)))
