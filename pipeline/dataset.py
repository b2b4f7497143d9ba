"""The shard set on disk: what `dataset.json` says, and every image's bytes one memory read away.

A set is finished when its `dataset.json` exists: it is written last. Opening one maps every shard and reads its index
and labels; nothing of an image is copied until a decoder asks for it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import mmap
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.rgb_stats import RgbStatistics

SCHEMA_VERSION = 1
DATASET_FILE = "dataset.json"
IMAGE_SIZE = 256  # The paper, section 2: shorter side to 256, then the central 256 x 256.
SPLITS = ("train", "val")
INDEX_VERSION = "v1.2"
IMAGE_COMPONENTS = ("jpg", "jpeg")  # Extensions of a sample's image; this program writes the first.
LABEL_COMPONENT = "cls"
TEMPORARY_SUFFIX = ".tmp"  # Of files being written aside; no reader looks at them.


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


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """The contents of `dataset.json`."""

    classes: tuple[ClassLabel, ...]
    splits: dict[str, Split]
    """By name: train and val."""
    image: dict[str, Any]
    """Resize and encoder settings: size, filter, quality, subsampling, encoder version; size and format alone where the
    tars were made elsewhere."""
    seed: int
    """Of the permutation that dealt the samples to shards; 0 where the tars were made elsewhere."""
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

    @property
    def annotated(self) -> bool:
        """Whether the tars were made elsewhere and only described by this program."""
        return "encoder" not in self.image

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> DatasetInfo:
        """Rebuilds the description from parsed JSON.

        Raises:
            DatasetError: if it is of another schema version or a field is missing or of the wrong kind.
        """
        version = value.get("schema_version")
        if version != SCHEMA_VERSION:
            raise DatasetError(f"its schema version is {version}, this program reads {SCHEMA_VERSION}: shard it again")
        try:
            return cls(
                classes=tuple(ClassLabel(int(c["index"]), str(c["wnid"]), str(c["name"])) for c in value["classes"]),
                splits={
                    name: Split(
                        int(split["samples"]),
                        int(split["bytes"]),
                        tuple(
                            ShardRow(shard_name(s["name"]), int(s["samples"]), int(s["bytes"]), str(s["sha256"]))
                            for s in split["shards"]
                        ),
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
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DatasetError(f"a field is missing or of the wrong kind ({type(error).__name__}: {error})") from error


def shard_name(name: str) -> str:
    """The name itself, if a shard may have it.

    Raises:
        ValueError: otherwise.
    """
    if not name or not all(c.isalnum() or c in "-_" for c in name):
        raise ValueError(f"a shard cannot be named {name!r}")
    return str(name)


def read_dataset(root: Path) -> DatasetInfo:
    """Reads ROOT/dataset.json.

    Raises:
        DatasetError: if there is none (the set is missing or unfinished) or it cannot be understood.
    """
    path = root / DATASET_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        state = "is unfinished: it has no dataset.json" if root.is_dir() else "does not exist"
        raise DatasetError(
            f"the shard set {root} {state}; make or finish it with: "
            f"python jobs/shard_imagenet.py --source IMAGES --output {root}"
        ) from None
    return parse_dataset(text, str(path))


def parse_dataset(text: str, where: str) -> DatasetInfo:
    """Parses the contents of a `dataset.json`.

    Raises:
        DatasetError: naming `where`, if it cannot be understood.
    """
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise DatasetError("it holds no JSON object")
        return DatasetInfo.from_json(value)
    except (json.JSONDecodeError, DatasetError) as error:
        raise DatasetError(f"{where} cannot be used: {error}") from error


def read_index(path: Path) -> list[dict[str, tuple[int, int, str]]]:
    """Reads a DALI webdataset index: for each sample, its components' (offset, size, file name) by extension, in lower
    case.

    Raises:
        DatasetError: if it is not a "v1.2" index or its count does not match its lines.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    header = lines[0].split() if lines else []
    if len(header) != 2 or header[0] != INDEX_VERSION or header[1] != str(len(lines) - 1):
        raise DatasetError(f"{path} is no whole {INDEX_VERSION} index: its first line is {lines[:1]}")
    samples = []
    for line in lines[1:]:
        fields = line.split(" ")
        groups = zip(fields[0::4], fields[1::4], fields[2::4], fields[3::4], strict=True)
        samples.append({extension.lower(): (int(offset), int(size), name) for extension, offset, size, name in groups})
    return samples


def rebuild_advice(root: Path, shard: str, settings: str = "", annotated: bool = False) -> str:
    """What to do about one damaged shard.

    Args:
        settings: the arguments besides source and output that the set was made with, where they are known.
        annotated: whether the set's tars were made elsewhere.
    """
    if annotated:
        return (
            f"copy {shard}.tar again from where it was made, then describe what is missing: "
            f"python jobs/shard_imagenet.py --annotate-only --output {root}"
        )
    return (
        "build the shard again from the source and with the settings it was made of: "
        f"python jobs/shard_imagenet.py --source IMAGES --output {root} {settings}--only {shard}"
    )


class SplitReader:
    """One split's images, memory-mapped.

    `labels` is int64 [samples]; `image(i)` is the JPEG bytes of sample i as a read-only uint8 view, not a copy.

    Raises:
        DatasetError: if a shard is missing or its size, index or labels do not match `dataset.json`.
    """

    def __init__(self, root: Path, info: DatasetInfo, split: str) -> None:
        if split not in info.splits:
            raise DatasetError(f"the shard set {root} has no {split} split")
        self.split = split
        self._maps: list[NDArray[np.uint8]] = []
        shard: list[int] = []
        offsets: list[int] = []
        sizes: list[int] = []
        labels: list[int] = []
        self._names: list[str] = []
        for number, row in enumerate(info.splits[split].shards):
            mapped, samples = _open_shard(root / split, row, info)
            self._maps.append(mapped)
            for label, offset, size, name in samples:
                shard.append(number)
                labels.append(label)
                offsets.append(offset)
                sizes.append(size)
                self._names.append(name)
        self._shard = np.array(shard, np.int32)
        self._offsets = np.array(offsets, np.int64)
        self._sizes = np.array(sizes, np.int64)
        self.labels = np.array(labels, np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, sample: int) -> NDArray[np.uint8]:
        """The JPEG bytes of one sample: a read-only view into its mapped shard."""
        offset = self._offsets[sample]
        return self._maps[self._shard[sample]][offset : offset + self._sizes[sample]]

    def key(self, sample: int) -> str:
        """A sample's file name in its shard, less its extension."""
        return self._names[sample].rpartition(".")[0]


def _open_shard(
    folder: Path, row: ShardRow, info: DatasetInfo
) -> tuple[NDArray[np.uint8], list[tuple[int, int, int, str]]]:
    """One shard's bytes and its samples as (label, offset, size, file name)."""
    path = folder / f"{row.name}.tar"
    advice = rebuild_advice(folder.parent, row.name, annotated=info.annotated)
    try:
        size = path.stat().st_size
        if size != row.bytes:
            raise DatasetError(f"{path} has {size} bytes, dataset.json says {row.bytes}")
        with path.open("rb") as file:
            mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        index = read_index(path.with_suffix(".idx"))
        if len(index) != row.samples:
            raise DatasetError(
                f"{path.with_suffix('.idx')} lists {len(index)} samples, dataset.json says {row.samples}"
            )
    except FileNotFoundError as error:
        raise DatasetError(f"{error.filename} is missing: {advice}") from None
    except DatasetError as error:
        raise DatasetError(f"{error}: {advice}") from error
    samples = []
    for components in index:
        image = next((components[extension] for extension in IMAGE_COMPONENTS if extension in components), None)
        if image is None or LABEL_COMPONENT not in components:
            raise DatasetError(f"{path}: a sample has {sorted(components)}, not jpg and cls: {advice}")
        offset, length, name = image
        at, digits, _ = components[LABEL_COMPONENT]
        if max(offset + length, at + digits) > size:
            raise DatasetError(f"{path}: sample {name} lies beyond the end of the file: {advice}")
        text = mapped[at : at + digits].tobytes().strip()
        if not text.isdigit() or int(text) >= len(info.classes):
            raise DatasetError(f"{path}: sample {name} has the label {text!r} of {len(info.classes)} classes: {advice}")
        samples.append((int(text), offset, length, name))
    return mapped, samples


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file aside, flushes it to the disk and renames it: a reader or a kill never meets half a file."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    # The rename itself is only durable once its folder is on the disk too.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, atomically; equal values give equal bytes."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())
