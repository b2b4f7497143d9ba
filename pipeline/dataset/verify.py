"""A finished shard set checked against its own descriptions: each shard by itself, then what only the whole tells.

Three things vouch for each other: the tars, `dataset.json` and the shards' annotations. A tar that has its digest tells
what its index and its part of the sample index must be. Of one that has not, the sample index tells which images are
damaged.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from pipeline.dataset.annotation import ShardAnnotation, ShardError, read_annotation
from pipeline.dataset.info import DATASET_FILE, REJECTS_FILE, DatasetError, DatasetInfo, ShardRow
from pipeline.dataset.sample_index import SampleIndex, index_file, index_is_whole, index_of, open_index, shard_rows
from pipeline.images.decode import IMAGE_SIZE, pixels_of_stored
from pipeline.images.rgb_stats import RgbMoments, RgbStatistics
from pipeline.sources.keys import key_hash, may_be_of
from pipeline.storage.locations import Location, join, shown
from pipeline.storage.remote import read, scan

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
    annotation: ShardAnnotation | None
    """None where it cannot be read."""


def open_indexes(root: Location, info: DatasetInfo) -> tuple[dict[str, SampleIndex], list[Fault]]:
    """The sample index of each split where it is what `dataset.json` vouches for, and the faults of the others."""
    indexes, faults = {}, []
    for split, part in info.splits.items():
        try:
            index = open_index(root, split, part, len(info.classes))
            if not index_is_whole(root, split, part):
                again = "remove the file, then run the command that made the set again"
                raise DatasetError(f"the sha256 of {index_file(split)} is not that of {DATASET_FILE}: {again}")
            indexes[split] = index
        except DatasetError as error:
            faults.append(Fault(str(error)))
    return indexes, faults


def check_shard(
    root: Location, split: str, row: ShardRow, rows: SampleIndex | None, info: DatasetInfo, decode: bool
) -> ShardReport:
    """Checks one shard that `dataset.json` lists; holds it in memory.

    Args:
        rows: its part of the sample index; None where that is damaged: see `open_indexes`.
        decode: whether to decode each image and sum its pixels, too.

    Raises:
        OSError: if a file that is there cannot be read.
    """
    shard = row.name
    faults: list[Fault] = []

    def fault(what: str) -> None:
        faults.append(Fault(what, shard))

    annotation = None
    try:
        annotation = read_annotation(join(root, split, f"{shard}.json"))
    except FileNotFoundError:
        fault("its annotation is missing")
    except ShardError as error:
        fault(f"its annotation cannot be read: {error}")
    # Of a tar that is damaged, the sample index tells where its images should be.
    samples, moments = rows, None
    try:
        tar = read(join(root, split, f"{shard}.tar"))
    except FileNotFoundError:
        fault("its tar is missing")
    else:
        if len(tar) != row.bytes:
            fault(f"its tar has {len(tar)} bytes, {DATASET_FILE} says {row.bytes}")
        digest = hashlib.sha256(tar).hexdigest()
        if digest != row.sha256:
            fault(f"the sha256 of its tar is {digest[:12]}..., {DATASET_FILE} says {row.sha256[:12]}...")
        else:
            try:
                index = index_of(tar)
                samples = SampleIndex.of(shard_rows(tar, index))
            except (tarfile.TarError, ValueError, OverflowError) as error:
                fault(f"its samples cannot be read: {error}")
            else:
                faults += _check_index(join(root, split, f"{shard}.idx"), index, shard)
                faults += _check_rows(rows, samples, row)
        if samples is not None:
            faults += _check_samples(samples, tar, info, shard)
            moments = _decode(samples, tar, faults, shard) if decode else None
    if annotation is not None:
        faults += _check_annotation(annotation, row, shard, info, moments)
    return ShardReport(split, shard, tuple(faults), annotation)


def check_set(
    root: Location, info: DatasetInfo, indexes: Mapping[str, SampleIndex], reports: Sequence[ShardReport]
) -> list[Fault]:
    """Checks what no shard tells by itself, from a report of each."""
    faults = list(_check_counts(info))
    for split, index in indexes.items():
        faults += repeated_keys(index, info.splits[split].shards)
    annotations = {report.name: report.annotation for report in reports}
    rejected = sum(len(a.rejected) for a in annotations.values() if a is not None)
    for split, row_names in ((s, {row.name for row in part.shards}) for s, part in info.splits.items()):
        for name in sorted(item.name for item in scan(join(root, split), missing_ok=True)):
            stem, extension = os.path.splitext(name)
            if stem in row_names and extension in (".tar", ".idx", ".json"):
                continue
            empty = _annotation_of_nothing(join(root, split, name))
            if empty is None:
                faults.append(Fault(f"{shown(join(root, split, name))} is no part of the set: remove it"))
            else:
                rejected += len(empty.rejected)
    faults += _check_rejects(root, info, rejected if all(annotations.values()) else None)
    training = [report.annotation for report in reports if report.split == "train"]
    if all(annotation is not None for annotation in training):
        moments = sum((a.moments for a in training if a is not None), RgbMoments())
        if not _same_statistics(RgbStatistics.of(moments), info.rgb):
            faults.append(Fault(f"the RGB statistics in {DATASET_FILE} are not those of the shards' moments"))
    return faults


def repeated_keys(index: SampleIndex, shards: Sequence[ShardRow]) -> list[Fault]:
    """A fault for each key of a split that was there before, with the later one's shard."""
    hashes = np.fromiter((key_hash(key.as_py()) for key in index.keys), np.uint64, len(index))
    order = np.argsort(hashes, kind="stable")
    again = order[1:][hashes[order][1:] == hashes[order][:-1]]
    return [Fault("it holds a sample's key that another sample has, too", shards[index.shards[i]].name) for i in again]


def _check_index(location: Location, index: str, shard: str) -> Iterator[Fault]:
    try:
        if read(location) != index.encode(errors="surrogateescape"):
            yield Fault("its index is not that of its tar", shard)
    except FileNotFoundError:
        yield Fault("its index is missing", shard)


def _check_rows(rows: SampleIndex | None, samples: SampleIndex, row: ShardRow) -> Iterator[Fault]:
    """Faults between a tar's samples, its part of the sample index and `dataset.json`."""
    shard = row.name
    if len(samples) != row.samples:
        yield Fault(f"its tar holds {len(samples)} samples, {DATASET_FILE} says {row.samples}", shard)
    elif rows is not None and len(samples) != len(rows):
        yield Fault(f"the sample index has {len(rows)} samples of it, its tar {len(samples)}", shard)
    elif rows is not None:
        for name, column in (("offset", "offsets"), ("size", "sizes"), ("label", "labels"), ("crc32", "checksums")):
            for sample in np.flatnonzero(getattr(samples, column) != getattr(rows, column))[:1].tolist():
                yield Fault(f"the sample index gives it another {name} than its tar", shard, samples.key(sample))
        if not samples.keys.equals(rows.keys):
            yield Fault("the sample index gives its samples other keys than its tar", shard)


def _check_samples(samples: SampleIndex, tar: bytes, info: DatasetInfo, shard: str) -> Iterator[Fault]:
    """Faults of single samples: other bytes than the rows vouch for, or a label that cannot be."""
    columns = (samples.offsets, samples.sizes, samples.checksums, samples.labels)
    for sample, (offset, size, crc32, label) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
        key = samples.key(sample)
        if zlib.crc32(tar[offset : offset + size]) != crc32:
            yield Fault("its image's bytes are not those that the sample index vouches for", shard, key)
        if not 0 <= label < len(info.classes):
            yield Fault(f"its label is {label}, the set has {len(info.classes)} classes", shard, key)
        elif not may_be_of(wnid := info.classes[label].wnid, key):
            yield Fault(f"its label is {label}, class {wnid}, which its key does not begin with", shard, key)


def _decode(samples: SampleIndex, tar: bytes, faults: list[Fault], shard: str) -> RgbMoments:
    """The moments of all images that decode to what a set holds."""
    moments = RgbMoments()
    for sample, (offset, length) in enumerate(zip(samples.offsets.tolist(), samples.sizes.tolist(), strict=True)):
        pixels = pixels_of_stored(tar[offset : offset + length])
        if pixels is None:
            size = f"{IMAGE_SIZE} x {IMAGE_SIZE} pixels"
            what = f"its image is not a complete baseline color JPEG of {size} without EXIF rotation"
            faults.append(Fault(what, shard, samples.key(sample)))
        else:
            moments += RgbMoments.of(pixels)
    return moments


def _check_annotation(
    annotation: ShardAnnotation,
    row: ShardRow,
    shard: str,
    info: DatasetInfo,
    moments: RgbMoments | None,
) -> Iterator[Fault]:
    """Faults between an annotation, `dataset.json` and the moments of the shard's pixels, if decoded."""
    for name in ("name", "samples", "bytes", "sha256"):
        said, needed = getattr(annotation, name), getattr(row, name)
        if said != needed:
            yield Fault(f"its annotation says {name} {said}, {DATASET_FILE} {needed}", shard)
    if annotation.rgb is None or not _same_statistics(annotation.rgb, info.rgb):
        yield Fault(f"its annotation's RGB statistics are not those of {DATASET_FILE}", shard)
    if annotation.moments.pixels != annotation.samples * IMAGE_SIZE**2:
        yield Fault(f"its annotation's moments are of {annotation.moments.pixels} pixels", shard)
    if moments is not None and moments != annotation.moments:
        yield Fault("the moments of its pixels are not those of its annotation", shard)


def _check_counts(info: DatasetInfo) -> Iterator[Fault]:
    for split, part in info.splits.items():
        for name in ("samples", "bytes"):
            total = sum(getattr(row, name) for row in part.shards)
            if getattr(part, name) != total:
                yield Fault(f"{DATASET_FILE} says {getattr(part, name)} {name} of {split}, its shards sum to {total}")


def _annotation_of_nothing(location: str) -> ShardAnnotation | None:
    """The annotation of a shard whose every image was set aside: it has neither a tar nor a row."""
    if not location.partition("?")[0].endswith(".json"):
        return None
    try:
        annotation = read_annotation(location)
    except ShardError:
        return None
    return None if annotation.samples else annotation


def _check_rejects(root: Location, info: DatasetInfo, annotated: int | None) -> Iterator[Fault]:
    """Args: annotated: how many images the annotations say were set aside; None where some cannot be read."""
    try:
        listed = [json.loads(line) for line in read(join(root, REJECTS_FILE)).decode().splitlines()]
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
