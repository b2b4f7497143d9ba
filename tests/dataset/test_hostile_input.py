"""What was made to do harm: a shard set or a checkpoint that names files elsewhere, claims absurd sizes or is code.

Each is refused in words that name it, nothing it names is touched, and no memory is taken for what it claims.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.import_weights import read_source
from jobs.training import checkpoint
from jobs.training.checkpoint import MODEL_FILE, OPTIMIZER_FILE
from jobs.training.run_state import STATE_FILE, CheckpointError
from model.training import Trainer
from pipeline.dataset.info import DATASET_FILE, DatasetError, parse_dataset, read_dataset
from pipeline.dataset.split_reader import SplitReader
from pipeline.staging.decoded_cache import stage_pixels
from pipeline.staging.staging import stage
from tests.damage import edit_dataset, overwrite, places, resealed, rewrite_index
from tests.model.test_training import IDENTITY, Recorder, make_trainer

ROOM = 2 * 2**30  # Bytes that a reader may take besides what it has; what is claimed here is always more.


@pytest.fixture
def little_room() -> Iterator[None]:
    """While it lasts, taking memory for what is claimed fails."""
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def first_row(value: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = value["splits"]["train"]["shards"][0]
    return row


# dataset.json.


NAMES = [
    "../../outside",
    "/etc/passwd",
    "..",
    "",
    "a\\b",
    "a\0b",
    "train-000000.tar\n",
    "s3://bucket/x",
    ["train"],
    None,
]
ROW = "splits train shards 0"


@pytest.mark.parametrize(
    ("part", "values", "reason"),
    [
        *((ROW, {"name": name}, "a shard cannot be named") for name in NAMES),
        (ROW, {"name": "train-000001"}, "two shards of train have one name"),
        (ROW, {"samples": 0}, "train has no shard, or one without an image"),
        ("splits val", {"shards": []}, "val has no shard, or one without an image"),
        (ROW, {"samples": float("inf")}, "OverflowError"),
        (ROW, {"bytes": 10**400}, "negative or too large number in train"),
        ("splits val", {"samples": -1}, "negative or too large number in val"),
        ("image", {"encoder": json.loads('{"a": ' * 800 + "0" + "}" * 800)}, "image settings are nested too deep"),
        ("rgb", {"mean": [0.5, 10**400, 0.5]}, "OverflowError"),
        ("rgb", {"eigenvalues": ["inf", 0, 0]}, "not finite numbers"),
        ("rgb", {"eigenvalues": [0.1, 0, -0.001]}, "negative eigenvalue"),
        ("classes 0", {"index": 10**9}, "not numbered from 0 on"),
        ("", {"set_aside": 10**400}, "negative or too large number in train"),
        ("", {"classes": 7}, "TypeError"),
        ("", {"splits": []}, "AttributeError"),
    ],
)
def test_a_description_of_no_set_is_refused(shard_set: Path, part: str, values: dict[str, Any], reason: str) -> None:
    value = inner = json.loads((shard_set / DATASET_FILE).read_text())
    for name in part.split():
        inner = inner[int(name) if name.isdigit() else name]
    inner.update(values)
    with pytest.raises(DatasetError, match=rf"^SET/dataset\.json cannot be used: .*{reason}.*; copy it again"):
        parse_dataset(json.dumps(value), "SET/dataset.json")


@pytest.mark.parametrize(
    "text",
    [b"[" * 100_000, b'{"schema_version": ' + b"9" * 10_000 + b"}", b'{"a": "\xff"}', b"[]", b"", pickle.dumps({})],
    ids=["deep", "long-number", "no-utf-8", "list", "empty", "pickle"],
)
def test_what_is_no_description_is_refused(text: bytes) -> None:
    with pytest.raises(DatasetError, match=r"^SET/dataset\.json cannot be used: "):
        parse_dataset(text, "SET/dataset.json")


def test_nothing_is_staged_from_or_to_another_folder(root: Path) -> None:
    edit_dataset(root, lambda value: first_row(value).update(name="../../outside"))
    with pytest.raises(DatasetError, match="a shard cannot be named"):
        stage(str(root), root.parent / "disk", print)
    assert not list(root.parent.glob("disk/**/*.tar"))


# Shards.


def test_a_shard_that_claims_to_be_huge_takes_no_memory(root: Path, little_room: None) -> None:
    edit_dataset(root, lambda value: first_row(value).update(samples=10**12))
    edit_dataset(root, lambda value: value["splits"]["train"].update(samples=10**12))
    with pytest.raises(DatasetError, match=r"train\.arrow is not the index that dataset\.json describes"):
        SplitReader(root, read_dataset(root), "train")
    with pytest.raises(DatasetError, match=r"need 196608000\.0 GB"):
        stage_pixels(str(root), root.parent / "disk", print, 1)
    edit_dataset(root, lambda value: first_row(value).update(bytes=10**18))
    with pytest.raises(DatasetError, match=r"needs 1000000000\.0 GB"):
        stage(str(root), root.parent / "disk", print)


def test_a_tar_larger_than_it_claims_is_not_copied_on(root: Path, little_room: None) -> None:
    """The disk has room for what was claimed."""
    tar = root / "train" / "train-000000.tar"
    stated = tar.stat().st_size
    os.truncate(tar, 2**40)
    with pytest.raises(DatasetError, match=f"it has more than {stated} bytes"):
        stage(str(root), root.parent / "disk", print)
    with pytest.raises(DatasetError, match=r"is not the shard that dataset\.json describes"):
        stage_pixels(str(root), root.parent / "pixels", print, 1)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"offset": 2**62}, "cannot be read|ends after 0 of"),
        ({"offset": 2**40}, "ends after 0 of"),
        ({"size": 2**32 - 1}, "the sample index gives it 4,294,967,295 bytes"),
        ({"offset": 0}, "is not what was written"),
    ],
)
def test_an_index_that_points_elsewhere_is_refused(
    root: Path, values: dict[str, int], reason: str, little_room: None
) -> None:
    rewrite_index(root, 3, **values)
    reader = SplitReader(root, read_dataset(root), "train")
    with pytest.raises(DatasetError, match=rf"train image {reader.key(3)} of train-000000: .*({reason})"):
        reader.read(np.arange(10))
    with pytest.raises(DatasetError, match=reader.key(3)):
        stage_pixels(str(root), root.parent / "disk", print, 1)


def bomb(side: int) -> bytes:
    """A small file whose header claims side x side pixels."""
    file = io.BytesIO()
    Image.new("RGB", (256, 256), "red").save(file, "JPEG")
    data = file.getvalue()
    frame = data.index(b"\xff\xc0")
    return data[: frame + 5] + side.to_bytes(2, "big") * 2 + data[frame + 9 :]


def test_an_image_that_claims_to_be_huge_is_named_and_takes_no_memory(root: Path, little_room: None) -> None:
    """By whoever decodes a set to look at it; training trusts the sharding, which decoded each image that it stored."""
    place = places(root, "train")[3]
    image = bomb(20_000)
    assert len(image) < place.size
    overwrite(place.tar, place.image, image)
    rewrite_index(root, 3, size=len(image), crc32=zlib.crc32(image))
    reader = SplitReader(root, read_dataset(root), "train")
    with pytest.raises(DatasetError, match=f"train image {reader.key(3)} of train-000000: it is 20000 x 20000"):
        reader.decoded(3)
    first = hashlib.sha256(place.tar.read_bytes()).hexdigest()
    edit_dataset(root, lambda value: first_row(value).update(sha256=first))
    with pytest.raises(DatasetError, match=f"{reader.key(3)}: it is 20000 x 20000"):
        stage_pixels(str(root), root.parent / "disk", print, 1)


# Checkpoints.


class Harm:
    """Code, as a pickle carries it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self._folder),)


@pytest.fixture
def saved(undisturbed: tuple[Trainer, Recorder], tmp_path: Path) -> Path:
    """A checkpoint that may be edited."""
    return Path(shutil.copytree(undisturbed[1].saved[-1], tmp_path / "run"))


@pytest.mark.parametrize("name", [MODEL_FILE, OPTIMIZER_FILE, STATE_FILE])
def test_a_pickle_is_refused_and_not_run(saved: Path, tmp_path: Path, name: str) -> None:
    harm = tmp_path / "harm"
    torch.save({"model": Harm(harm)}, tmp_path / "code")
    (saved / name).write_bytes((tmp_path / "code").read_bytes())
    with pytest.raises(CheckpointError, match=name):
        checkpoint.restore(saved, make_trainer(), IDENTITY)
    assert not harm.exists()
    # It would have done it.
    torch.load(tmp_path / "code", weights_only=False)
    assert harm.exists()


def test_published_weights_that_are_code_are_refused_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "alexnet.pth.tar"
    torch.save({"state_dict": Harm(tmp_path / "harm")}, path)
    with pytest.raises(ValueError, match=r"alexnet\.pth\.tar"):
        read_source(path)
    assert not (tmp_path / "harm").exists()


STATES = {
    "deep": lambda text: "[" * 100_000,
    "list": lambda text: "[]",
    "long-number": lambda text: text.replace('"epoch": 4', '"epoch": ' + "9" * 10_000, 1),
    "negative": lambda text: text.replace('"epoch": 4', '"epoch": -4', 1),
    "unknown": lambda text: text.replace('"epoch": 4', '"epoch": 4, "__class__": "os.system"', 1),
    "rate": lambda text: text.replace('"lr": 0.05', '"lr": NaN', 1),
    # As of a later version: neither could be compared with this command's.
    "decoder": lambda text: text.replace(IDENTITY.decoder, "another"),
    "precision": lambda text: text.replace(IDENTITY.precision, "another"),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_of_no_run_is_refused(saved: Path, name: str) -> None:
    text = (saved / STATE_FILE).read_text()
    changed = STATES[name](text)
    assert changed != text
    # With the digest that this program would have given it, where it is JSON at all.
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(changed)
        changed = resealed(value) if isinstance(value, dict) else changed
    (saved / STATE_FILE).write_text(changed)
    told = "'another' is none of" if "another" in changed else ""
    with pytest.raises(CheckpointError, match=f"{STATE_FILE}.*{told}"):
        checkpoint.restore(saved, make_trainer(), IDENTITY)
