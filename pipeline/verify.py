"""A finished shard set checked against its own descriptions: each shard by itself, then what only the whole tells.

Three things vouch for each other: the tars, `dataset.json` and the shards' annotations. What is wrong is named by shard
and, where it can be told, by sample.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.annotation import ShardAnnotation, ShardError, read_annotation
from pipeline.dataset import DATASET_FILE, IMAGE_SIZE, INDEX_VERSION, DatasetInfo, ShardRow
from pipeline.keys import may_be_of
from pipeline.rgb_stats import RgbMoments, RgbStatistics
from pipeline.shard_set import REJECTS_FILE
from pipeline.source_files import SourceError
from pipeline.tar_source import Member, members, whole

# Another machine's LAPACK may round the last digits of the eigenvectors otherwise.
TOLERANCE = 1e-9


@dataclasses.dataclass(frozen=True)
class Fault:
    """One thing that is wrong."""

    what: str
    """A clause about the shard or sample."""
    shard: str = ""
    """Empty where it is the set's."""
    sample: str = ""
    """Its key, where one is to blame."""

    def __str__(self) -> str:
        where = " ".join(part for part in (self.shard, self.sample) if part)
        return f"{where}: {self.what}" if where else self.what


@dataclasses.dataclass(frozen=True)
class ShardReport:
    """What checking one shard came to."""

    split: str
    name: str
    faults: tuple[Fault, ...]
    per_class: NDArray[np.int64]
    """[classes]: how many samples of each class it holds."""
    key_hashes: NDArray[np.uint64]
    """[samples]: 64 bits of each key, lower case, to find keys that two shards share."""
    annotation: ShardAnnotation | None
    """None where it cannot be read."""


@dataclasses.dataclass(frozen=True)
class _Sample:
    key: str
    label: bytes
    jpeg: bytes
    index_line: str


def check_shard(root: Path, split: str, row: ShardRow, info: DatasetInfo, decode: bool) -> ShardReport:
    """Checks one shard that `dataset.json` lists; holds it in memory.

    Args:
        decode: whether to decode each image and sum its pixels, too.

    Raises:
        OSError: if a file that is there cannot be read.
    """
    path = root / split / f"{row.name}.tar"
    faults: list[Fault] = []

    def fault(what: str, sample: str = "") -> None:
        faults.append(Fault(what, row.name, sample))

    annotation = None
    try:
        annotation = read_annotation(path.with_suffix(".json"))
    except FileNotFoundError:
        fault("its annotation is missing")
    except ShardError as error:
        fault(f"its annotation cannot be read: {error}")
    samples: list[_Sample] = []
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        fault("its tar is missing")
    else:
        if len(data) != row.bytes:
            fault(f"its tar has {len(data)} bytes, {DATASET_FILE} says {row.bytes}")
        digest = hashlib.sha256(data).hexdigest()
        if digest != row.sha256:
            fault(f"the sha256 of its tar is {digest[:12]}..., {DATASET_FILE} says {row.sha256[:12]}...")
        samples = _read_samples(path, data, faults, row.name)
        if len(samples) != row.samples:
            fault(f"its tar holds {len(samples)} samples, {DATASET_FILE} says {row.samples}")
        # Else the index would be blamed for the tar.
        else:
            _check_index(path.with_suffix(".idx"), samples, faults, row.name)
    per_class = np.zeros(len(info.classes), np.int64)
    for sample in samples:
        wrong = _wrong_label(sample, info)
        if wrong:
            fault(wrong, sample.key)
        else:
            per_class[int(sample.label)] += 1
    moments = _decode(samples, faults, row.name) if decode else None
    if annotation is not None:
        faults += _check_annotation(annotation, row, info, samples, moments)
    hashes = np.array([_hash(sample.key) for sample in samples], np.uint64)
    return ShardReport(split, row.name, tuple(faults), per_class, hashes, annotation)


def check_set(root: Path, info: DatasetInfo, reports: Sequence[ShardReport]) -> list[Fault]:
    """Checks what no shard tells by itself, from a report of each."""
    faults = list(_check_counts(info))
    for split in info.splits:
        mine = [report for report in reports if report.split == split]
        hashes = np.concatenate([report.key_hashes for report in mine])
        owner = np.repeat(np.arange(len(mine)), [len(report.key_hashes) for report in mine])
        order = np.argsort(hashes, kind="stable")
        again = order[1:][hashes[order][1:] == hashes[order][:-1]]
        faults += [Fault("it holds a sample's key that another sample has, too", mine[owner[i]].name) for i in again]
    annotations = {report.name: report.annotation for report in reports}
    rejected = sum(len(a.rejected) for a in annotations.values() if a is not None)
    for split, row_names in ((s, {row.name for row in part.shards}) for s, part in info.splits.items()):
        for path in sorted((root / split).iterdir()) if (root / split).is_dir() else []:
            if path.stem in row_names and path.suffix in (".tar", ".idx", ".json"):
                continue
            empty = _annotation_of_nothing(path)
            if empty is None:
                faults.append(Fault(f"{path} is no part of the set: remove it"))
            else:
                rejected += len(empty.rejected)
    faults += _check_rejects(root, info, rejected if all(annotations.values()) else None)
    training = [report.annotation for report in reports if report.split == "train"]
    if all(annotation is not None for annotation in training):
        moments = sum((a.moments for a in training if a is not None), RgbMoments())
        if not _same_statistics(RgbStatistics.of(moments), info.rgb):
            faults.append(Fault(f"the RGB statistics in {DATASET_FILE} are not those of the shards' moments"))
    return faults


def _read_samples(path: Path, data: bytes, faults: list[Fault], shard: str) -> list[_Sample]:
    """The whole samples of a tar: KEY.cls, then KEY.jpg."""
    found: list[Member] = []
    try:
        # One by one, to keep those before the damage.
        for member in members(whole(path)):
            found.append(member)
    except SourceError as error:
        faults.append(Fault(f"its tar cannot be read to its end: {error}", shard))
    samples = []
    for label, image in zip(found[0::2], found[1::2], strict=False):
        key = label.name.removesuffix(".cls")
        if (label.name, image.name) != (f"{key}.cls", f"{key}.jpg"):
            faults.append(Fault(f"its tar has {label.name} and {image.name} where KEY.cls and KEY.jpg belong", shard))
            break
        line = f"cls {label.offset} {label.size} {label.name} jpg {image.offset} {image.size} {image.name}"
        texts = [data[part.offset : part.offset + part.size] for part in (label, image)]
        samples.append(_Sample(key, texts[0], texts[1], line))
    if len(found) % 2:
        faults.append(Fault(f"its tar ends with {found[-1].name} and no image for it", shard))
    return samples


def _check_index(path: Path, samples: Sequence[_Sample], faults: list[Fault], shard: str) -> None:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        faults.append(Fault("its index is missing", shard))
        return
    if lines[:1] != [f"{INDEX_VERSION} {len(samples)}"]:
        faults.append(
            Fault(f"its index begins with {''.join(lines[:1])[:40]!r}, its tar has {len(samples)} samples", shard)
        )
    for sample, line in zip(samples, lines[1:], strict=False):
        if line != sample.index_line:
            faults.append(Fault(f"its index says {line[:120]!r}, its tar {sample.index_line!r}", shard, sample.key))
            break
    if len(lines) - 1 != len(samples):
        faults.append(Fault(f"its index has {len(lines) - 1} lines for {len(samples)} samples", shard))


def _wrong_label(sample: _Sample, info: DatasetInfo) -> str:
    """What is wrong with a sample's label; empty where nothing is."""
    if not sample.label.isdigit() or int(sample.label) >= len(info.classes):
        return f"its label is {sample.label[:20]!r}, the set has {len(info.classes)} classes"
    wnid = info.classes[int(sample.label)].wnid
    if not may_be_of(wnid, sample.key):
        return f"its label is {int(sample.label)}, class {wnid}, which its key does not begin with"
    return ""


def _decode(samples: Sequence[_Sample], faults: list[Fault], shard: str) -> RgbMoments:
    """The moments of all images that decode to what a set holds."""
    moments = RgbMoments()
    for sample in samples:
        try:
            with Image.open(io.BytesIO(sample.jpeg), formats=["JPEG"]) as image:
                if (image.mode, image.size) != ("RGB", (IMAGE_SIZE, IMAGE_SIZE)):
                    size = f"{image.width} x {image.height} {image.mode}"
                    faults.append(Fault(f"it is {size}, not {IMAGE_SIZE} x {IMAGE_SIZE} RGB", shard, sample.key))
                    continue
                moments += RgbMoments.of(np.asarray(image))
        # As in the conversion: Pillow raises whatever the bytes lead it to.
        except Exception as error:
            faults.append(Fault(f"it does not decode: {' '.join(str(error).split())[:200]}", shard, sample.key))
    return moments


def _check_annotation(
    annotation: ShardAnnotation,
    row: ShardRow,
    info: DatasetInfo,
    samples: Sequence[_Sample],
    moments: RgbMoments | None,
) -> Iterator[Fault]:
    """Faults between an annotation, `dataset.json`, the samples and the moments of their pixels, if decoded."""
    for name in ("name", "samples", "bytes", "sha256"):
        said, needed = getattr(annotation, name), getattr(row, name)
        if said != needed:
            yield Fault(f"its annotation says {name} {said}, {DATASET_FILE} {needed}", row.name)
    if annotation.rgb is None or not _same_statistics(annotation.rgb, info.rgb):
        yield Fault(f"its annotation's RGB statistics are not those of {DATASET_FILE}", row.name)
    if annotation.moments.pixels != annotation.samples * IMAGE_SIZE**2:
        yield Fault(f"its annotation's moments are of {annotation.moments.pixels} pixels", row.name)
    if moments is not None and moments != annotation.moments:
        yield Fault("the moments of its pixels are not those of its annotation", row.name)
    if len(annotation.crc32) != annotation.samples:
        yield Fault(f"its annotation has {len(annotation.crc32)} checksums", row.name)
    for sample, checksum in zip(samples, annotation.crc32, strict=False):
        if zlib.crc32(sample.jpeg) != checksum:
            yield Fault("its image's bytes are not those that its annotation vouches for", row.name, sample.key)


def _check_counts(info: DatasetInfo) -> Iterator[Fault]:
    for split, part in info.splits.items():
        for name in ("samples", "bytes"):
            total = sum(getattr(row, name) for row in part.shards)
            if getattr(part, name) != total:
                yield Fault(f"{DATASET_FILE} says {getattr(part, name)} {name} of {split}, its shards sum to {total}")


def _annotation_of_nothing(path: Path) -> ShardAnnotation | None:
    """The annotation of a shard whose every image was set aside: it has neither a tar nor a row."""
    if path.suffix != ".json":
        return None
    try:
        annotation = read_annotation(path)
    except ShardError:
        return None
    return None if annotation.samples else annotation


def _check_rejects(root: Path, info: DatasetInfo, annotated: int | None) -> Iterator[Fault]:
    """Args: annotated: how many images the annotations say were set aside; None where some cannot be read."""
    try:
        listed = [json.loads(line) for line in (root / REJECTS_FILE).read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        yield Fault(f"{REJECTS_FILE} is missing")
        return
    except ValueError:
        yield Fault(f"{REJECTS_FILE} holds a line that is no JSON")
        return
    for who, count in ((DATASET_FILE, info.set_aside), ("the shards' annotations", annotated)):
        if count is not None and count != len(listed):
            yield Fault(f"{REJECTS_FILE} lists {len(listed)} images that were set aside, for {who} it is {count}")


def _same_statistics(one: RgbStatistics, other: RgbStatistics) -> bool:
    if one.pixels != other.pixels:
        return False
    names = ("mean", "std", "covariance", "eigenvalues", "eigenvectors")
    return all(np.allclose(getattr(one, name), getattr(other, name), rtol=0, atol=TOLERANCE) for name in names)


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.lower().encode(), digest_size=8).digest(), "little")
