"""The shard set on disk, by its own account: `dataset.json`, and what to do about damage.

A set is finished when its `dataset.json` exists: it is written last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from shlex import quote
from typing import Any

from pipeline.images.rgb_stats import RgbStatistics
from pipeline.storage.locations import Location, is_url, join, shown
from pipeline.storage.remote import read, write

SCHEMA_VERSION = 1
DATASET_FILE = "dataset.json"
STAGED_FILE = "staged.json"  # In a staged copy: where it was copied from.
REJECTS_FILE = "rejects.jsonl"
DECODED_FILE = "pixels.json"  # In a staged copy that holds decoded pixels.
SPLITS = ("train", "val")
INDEX_VERSION = "v1.2"


class DatasetError(ValueError):
    """A shard set that is missing, unfinished, of another version, or does not match its own description."""


@dataclasses.dataclass(frozen=True)
class ClassLabel:
    """One class."""

    index: int
    """Its label, from 0."""
    wnid: str
    """The name of its folder: for ImageNet, its WordNet id."""
    name: str
    """What a person calls it; the wnid where no name is known."""


@dataclasses.dataclass(frozen=True)
class ShardRow:
    """One shard, as `dataset.json` lists it."""

    name: str
    """train-000000: its files are SPLIT/NAME.tar, .idx and .json."""
    samples: int
    bytes: int
    """Size of the tar."""
    sha256: str
    """Of the tar."""


@dataclasses.dataclass(frozen=True)
class Split:
    """All shards of one split."""

    samples: int
    bytes: int
    shards: tuple[ShardRow, ...]
    index_sha256: str = ""
    """Of the sample index, SPLIT.arrow."""
    labels_crc32: int = 0
    """Of the labels in it, int32 little-endian."""


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """The contents of `dataset.json`."""

    classes: tuple[ClassLabel, ...]
    splits: dict[str, Split]
    """By name: train and val."""
    image: dict[str, Any]
    """Resize and encoder settings: size, filter, quality, subsampling, encoder version."""
    seed: int
    """Of the permutation that dealt the samples to shards."""
    rgb: RgbStatistics
    """Of the stored training pixels."""
    source_fingerprint: str
    """sha256 over the source's listing."""
    set_aside: int
    """How many images are in `rejects.jsonl` and not in the set."""
    schema_version: int = SCHEMA_VERSION

    @property
    def fingerprint(self) -> str:
        """sha256 over the shards' names and digests and the classes: two sets with the same one hold the same data."""
        digest = hashlib.sha256()
        for split in sorted(self.splits):
            for shard in self.splits[split].shards:
                digest.update(f"{split} {shard.name} {shard.samples} {shard.sha256}\n".encode())
        for label in self.classes:
            digest.update(f"{label.index} {label.wnid}\n".encode())
        return digest.hexdigest()

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> DatasetInfo:
        """Rebuilds the description from parsed JSON.

        Raises:
            DatasetError: if it is of another schema version, a field is missing or of the wrong kind, or it contradicts
                itself.
        """
        version = value.get("schema_version")
        if version != SCHEMA_VERSION:
            raise DatasetError(f"its schema version is {version}, this program reads {SCHEMA_VERSION}: shard it again")
        try:
            info = cls(
                classes=tuple(ClassLabel(int(c["index"]), str(c["wnid"]), str(c["name"])) for c in value["classes"]),
                splits={
                    name: Split(
                        int(split["samples"]),
                        int(split["bytes"]),
                        tuple(
                            ShardRow(shard_name(s["name"]), int(s["samples"]), int(s["bytes"]), str(s["sha256"]))
                            for s in split["shards"]
                        ),
                        str(split["index_sha256"]),
                        int(split["labels_crc32"]),
                    )
                    for name, split in value["splits"].items()
                    if name in SPLITS
                },
                image=dict(value["image"]),
                seed=int(value["seed"]),
                rgb=RgbStatistics.from_json(value["rgb"]),
                source_fingerprint=str(value["source_fingerprint"]),
                set_aside=int(value["set_aside"]),
            )
            info._check_contradictions()
        # int() of Infinity, which Python's JSON knows, is an OverflowError.
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise DatasetError(f"a field is missing or of the wrong kind ({type(error).__name__}: {error})") from error
        return info

    def _check_contradictions(self) -> None:
        """Raises ValueError for what can be of no set."""
        if [label.index for label in self.classes] != list(range(len(self.classes))):
            raise ValueError("the classes are not numbered from 0 on, in order")
        values = {**self.image, "encoder": None, **self.image.get("encoder", {})}.values()
        if any(isinstance(value, dict | list) for value in values):
            raise ValueError("the image settings are nested too deep")
        if min(self.rgb.eigenvalues) < 0:
            raise ValueError("negative eigenvalue")
        for name, split in self.splits.items():
            rows = split.shards
            numbers = [split.samples, split.bytes, split.labels_crc32, self.set_aside]
            numbers += (number for row in rows for number in (row.samples, row.bytes))
            if not all(0 <= number < 2**63 for number in numbers):
                raise ValueError(f"negative or too large number in {name} or a shard of it")
            if not rows or not all(row.samples for row in rows):
                raise ValueError(f"{name} has no shard, or one without an image")
            if len({row.name for row in rows}) < len(rows):
                raise ValueError(f"two shards of {name} have one name")


def shard_name(name: object) -> str:
    """The name itself, if a shard may have it.

    Raises:
        ValueError: otherwise.
    """
    if not isinstance(name, str) or not name or not all(c.isalnum() or c in "-_" for c in name):
        raise ValueError(f"a shard cannot be named {name!r}")
    return name


def read_dataset(root: Location) -> DatasetInfo:
    """Reads ROOT/dataset.json of a set at a path or URL.

    Raises:
        DatasetError: if there is none (the set is missing or unfinished), or it cannot be read or understood.
    """
    where = shown(root)
    try:
        text = read(join(root, DATASET_FILE))
    except FileNotFoundError:
        there = is_url(root) or Path(root).is_dir()
        raise DatasetError(
            f"the shard set {where} {'is unfinished: it has no dataset.json' if there else 'does not exist'}; make or "
            f"finish it with: python jobs/shard_imagenet.py --source IMAGES --output {quote(where)}"
        ) from None
    except OSError as error:
        raise DatasetError(f"{DATASET_FILE} of the shard set {where} cannot be read: {error}") from error
    return parse_dataset(text, f"{where}/{DATASET_FILE}")


def parse_dataset(text: str | bytes, where: str) -> DatasetInfo:
    """Parses the contents of a `dataset.json`.

    Raises:
        DatasetError: naming `where`, if it cannot be understood.
    """
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise DatasetError("it holds no JSON object")
        return DatasetInfo.from_json(value)
    # Of JSON that goes too deep, whose numbers are too long or that is no UTF-8, Python's errors are others.
    except (ValueError, RecursionError) as error:
        raise DatasetError(
            f"{where} cannot be used: {error}; copy it again from where it was made, or make the set again"
        ) from error


def rebuild_advice(root: Location, split: str, shard: str, settings: str = "") -> str:
    """What to do about one damaged shard.

    Args:
        settings: the arguments besides source and output that the set was made with, where they are known.
    """
    folder = quote(shown(root))
    remove = (
        f"delete {folder}/{split}/{shard}.* in the store, then" if is_url(root) else f"rm {folder}/{split}/{shard}.* &&"
    )
    return (
        "remove the shard and build it again, from the source and with the settings it was made of: "
        f"{remove} python jobs/shard_imagenet.py --source IMAGES --output {folder} {settings}"
    ).rstrip()


def is_decoded(root: Path) -> bool:
    """Whether a folder is a cache of decoded pixels, finished or not."""
    return (root / DECODED_FILE).exists()


def staged_from(root: Location) -> str | None:
    """Where a staged copy was copied from. None if the set is no copy; a set at a URL never is one.

    Raises:
        DatasetError: if the file that says so is damaged.
    """
    if is_url(root):
        return None
    file = join(root, STAGED_FILE)
    try:
        return str(json.loads(read(file))["from"])
    except FileNotFoundError:
        return None
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise DatasetError(
            f"{file} is damaged: delete {shown(root)}, and run the command that staged it again"
        ) from error


def repair_advice(root: Path, split: str, shard: str) -> str:
    """What to do about one damaged shard of a set that may be a staged copy."""
    origin = staged_from(root)
    if origin is None:
        return rebuild_advice(root, split, shard)
    file = root / split / f"{shard}{'.rgb' if is_decoded(root) else '.tar'}"
    return (
        f"this is a staged copy, so delete {file} and run the same command again, which stages it from {origin}; if it "
        f"is damaged there too, {rebuild_advice('SET', split, shard)}"
    )


def write_json(location: Location, value: Any) -> None:
    """Writes a value as indented JSON, at once or not at all; equal values give equal bytes."""
    write(location, (json.dumps(value, indent=2) + "\n").encode())
