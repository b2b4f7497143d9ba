"""A finished shard set checked against its own descriptions: each shard by itself, then what only the whole tells.

Three things vouch for each other: the tars, `dataset.json` and the shards' annotations. What is wrong is named by shard
and, where it can be told, by sample.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.dataset.annotation import ShardAnnotation, ShardError, read_annotation
from pipeline.dataset.info import DATASET_FILE, INDEX_VERSION, REJECTS_FILE, DatasetError, DatasetInfo, ShardRow
from pipeline.dataset.sample_index import SampleIndex, index_file, index_is_whole, open_index, shard_rows
from pipeline.dataset.shard_samples import Fault, Sample, read_samples
from pipeline.images.decode import IMAGE_SIZE, pixels_of_stored
from pipeline.images.rgb_stats import RgbMoments, RgbStatistics
from pipeline.sources.keys import key_hash, may_be_of
from pipeline.storage.locations import Location, join, shown
from pipeline.storage.remote import read, scan

# Another machine's LAPACK may round the last digits of the eigenvectors otherwise.
TOLERANCE = 1e-9


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


def index_to_check(root: Location, info: DatasetInfo, split: str) -> SampleIndex | None:
    """A split's sample index; None where it is not what `dataset.json` vouches for, which `check_set` says."""
    part = info.splits[split]
    try:
        return open_index(root, split, part, len(info.classes)) if index_is_whole(root, split, part) else None
    except DatasetError:
        return None


def check_shard(
    root: Location, split: str, row: ShardRow, rows: SampleIndex | None, info: DatasetInfo, decode: bool
) -> ShardReport:
    """Checks one shard that `dataset.json` lists; holds it in memory.

    Args:
        rows: its part of the sample index; None where that is damaged: see `index_to_check`.
        decode: whether to decode each image and sum its pixels, too.

    Raises:
        OSError: if a file that is there cannot be read.
    """
    shard = row.name
    tar = join(root, split, f"{shard}.tar")
    faults: list[Fault] = []

    def fault(what: str, sample: str = "") -> None:
        faults.append(Fault(what, shard, sample))

    annotation = None
    try:
        annotation = read_annotation(join(root, split, f"{shard}.json"))
    except FileNotFoundError:
        fault("its annotation is missing")
    except ShardError as error:
        fault(f"its annotation cannot be read: {error}")
    samples: list[Sample] = []
    try:
        data = read(tar)
    except FileNotFoundError:
        fault("its tar is missing")
    else:
        if len(data) != row.bytes:
            fault(f"its tar has {len(data)} bytes, {DATASET_FILE} says {row.bytes}")
        digest = hashlib.sha256(data).hexdigest()
        if digest != row.sha256:
            fault(f"the sha256 of its tar is {digest[:12]}..., {DATASET_FILE} says {row.sha256[:12]}...")
        samples = list(read_samples(tar, data, faults, shard))
        if len(samples) != row.samples:
            fault(f"its tar holds {len(samples)} samples, {DATASET_FILE} says {row.samples}")
        # Else the index would be blamed for the tar.
        else:
            _check_index(join(root, split, f"{shard}.idx"), samples, faults, shard)
    per_class = np.zeros(len(info.classes), np.int64)
    for sample in samples:
        wrong = _wrong_label(sample, info)
        if wrong:
            fault(wrong, sample.key)
        else:
            per_class[int(sample.label)] += 1
    moments = _decode(samples, faults, shard) if decode else None
    if annotation is not None:
        faults += _check_annotation(annotation, row, shard, info, moments)
    # Else the sample index would be blamed for the tar.
    if rows is not None and len(samples) == row.samples and per_class.sum() == row.samples:
        faults += _check_rows(rows, shard, samples, data)
    hashes = np.array([key_hash(sample.key) for sample in samples], np.uint64)
    return ShardReport(split, shard, tuple(faults), per_class, hashes, annotation)


def check_set(root: Location, info: DatasetInfo, reports: Sequence[ShardReport]) -> list[Fault]:
    """Checks what no shard tells by itself, from a report of each."""
    faults = list(_check_counts(info))
    for split, part in info.splits.items():
        try:
            open_index(root, split, part, len(info.classes))
            if not index_is_whole(root, split, part):
                again = "remove the file, then run the command that made the set again"
                faults.append(Fault(f"the sha256 of {index_file(split)} is not that of {DATASET_FILE}: {again}"))
        except DatasetError as error:
            faults.append(Fault(str(error)))
    for split in info.splits:
        mine = [report for report in reports if report.split == split]
        faults += repeated_keys([report.name for report in mine], [report.key_hashes for report in mine])
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


def repeated_keys(shards: Sequence[str], hashes: Sequence[NDArray[np.uint64]]) -> list[Fault]:
    """A fault for each key of a split that was there before, with the later one's shard.

    Args:
        shards: their names.
        hashes: for each shard, [samples] of `key_hash`.
    """
    every = np.concatenate(hashes)
    owner = np.repeat(np.arange(len(shards)), [len(part) for part in hashes])
    order = np.argsort(every, kind="stable")
    again = order[1:][every[order][1:] == every[order][:-1]]
    return [Fault("it holds a sample's key that another sample has, too", shards[owner[i]]) for i in again]


def _check_index(location: str, samples: Sequence[Sample], faults: list[Fault], shard: str) -> None:
    try:
        lines = read(location).decode(errors="replace").splitlines()
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


def _wrong_label(sample: Sample, info: DatasetInfo) -> str:
    """What is wrong with a sample's label; empty where nothing is."""
    if sample.number is None or sample.number >= len(info.classes):
        return f"its label is {sample.label[:20]!r}, the set has {len(info.classes)} classes"
    wnid = info.classes[sample.number].wnid
    if not may_be_of(wnid, sample.key):
        return f"its label is {sample.number}, class {wnid}, which its key does not begin with"
    return ""


def _decode(samples: Sequence[Sample], faults: list[Fault], shard: str) -> RgbMoments:
    """The moments of all images that decode to what a set holds."""
    moments = RgbMoments()
    for sample in samples:
        pixels = pixels_of_stored(sample.jpeg)
        if pixels is None:
            size = f"{IMAGE_SIZE} x {IMAGE_SIZE} pixels"
            what = f"its image is not a complete baseline color JPEG of {size} without EXIF rotation"
            faults.append(Fault(what, shard, sample.key))
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


def _check_rows(index: SampleIndex, shard: str, samples: Sequence[Sample], tar: bytes) -> Iterator[Fault]:
    """Faults between a tar and its part of the sample index."""
    found = shard_rows(tar, "\n".join([INDEX_VERSION, *(sample.index_line for sample in samples)]))
    if len(found) != len(index):
        yield Fault(f"the sample index has {len(index)} samples of it, its tar {len(found)}", shard)
        return
    for name, stated in (("offset", index.offsets), ("size", index.sizes), ("label", index.labels)):
        for sample in np.flatnonzero(found[name].to_numpy() != stated)[:1].tolist():
            yield Fault(f"the sample index gives it another {name} than its tar", shard, samples[sample].key)
    for sample in np.flatnonzero(found["crc32"].to_numpy() != index.checksums).tolist():
        yield Fault("its image's bytes are not those that the sample index vouches for", shard, samples[sample].key)
    if not found["key"].equals(index.keys):
        yield Fault("the sample index gives its samples other keys than its tar", shard)


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
