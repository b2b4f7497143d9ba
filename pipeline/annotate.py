"""An index and an annotation for one tar that another program made, whose bytes are never touched."""

from __future__ import annotations

import dataclasses
import hashlib
import mmap
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.annotation import ShardAnnotation, ShardError, read_annotation
from pipeline.dataset import INDEX_VERSION, write_atomically, write_json
from pipeline.decode import ImageError
from pipeline.label_names import merge_stated, stated_wnid
from pipeline.rgb_stats import RgbMoments
from pipeline.sample_index import shard_rows
from pipeline.shard_samples import Fault, Sample, key_hash, read_samples, stored_pixels
from pipeline.tar_source import whole

MAX_FAULTS = 20  # Of one shard: if more are wrong, most may be, and decoding on tells nothing new.
MAX_CLASSES = 100_000  # Where only the labels tell how many there are; one wrong label must not ask for a terabyte.


@dataclasses.dataclass(frozen=True)
class AnnotatedShard:
    """What annotating one shard came to."""

    split: str
    name: str
    faults: tuple[Fault, ...]
    kept: bool
    """Whether it was annotated before."""
    annotation: ShardAnnotation | None
    """None where there are faults."""
    per_class: NDArray[np.int64]
    """[largest label + 1]: how many samples have each label."""
    largest: str
    """The key of a sample with the largest label."""
    wnids: dict[int, str]
    """What the samples of each label state to be its wnid."""
    key_hashes: NDArray[np.uint64]
    """[samples]: `key_hash` of each key."""
    rows: pa.RecordBatch | None
    """Its part of the sample index; None where there are faults."""


@dataclasses.dataclass
class _Contents:
    """What one pass over a tar gathers."""

    shard: str
    """As faults name it."""
    faults: list[Fault] = dataclasses.field(default_factory=list)
    labels: list[int] = dataclasses.field(default_factory=list)
    keys: list[str] = dataclasses.field(default_factory=list)
    wnids: dict[int, str] = dataclasses.field(default_factory=dict)
    index: list[str] = dataclasses.field(default_factory=list)
    rows: pa.RecordBatch | None = None
    moments: RgbMoments = RgbMoments()  # noqa: RUF009 (frozen)

    def report(self, split: str, name: str, annotation: ShardAnnotation | None, kept: bool) -> AnnotatedShard:
        labels = np.array(self.labels, np.int64)
        return AnnotatedShard(
            split,
            name,
            tuple(self.faults),
            kept,
            annotation,
            np.bincount(labels),
            self.keys[int(labels.argmax())] if self.keys else "",
            self.wnids,
            np.array([key_hash(key) for key in self.keys], np.uint64),
            self.rows,
        )


def annotate_shard(root: Path, split: str, name: str, classes: int | None) -> AnnotatedShard:
    """Writes the index and the annotation of one tar, unless they are there and are this tar's by size and sha256.

    Args:
        classes: how many there are; None where only the labels tell.

    Raises:
        OSError: if a file cannot be read or written.
    """
    path = root / split / f"{name}.tar"
    contents = _Contents(f"{split}/{name}")

    def fault(what: str) -> AnnotatedShard:
        contents.faults.append(Fault(what, contents.shard))
        return contents.report(split, name, None, kept=False)

    found = None
    try:
        found = read_annotation(path.with_suffix(".json"))
    except FileNotFoundError:
        pass
    except ShardError as error:
        return fault(f"beside it lies a file that is no annotation of this program ({error}): move it away")
    if path.stat().st_size == 0:
        return fault("its tar is empty: copy it again")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        size, digest = len(data), hashlib.sha256(data).hexdigest()
        if found is not None and (found.bytes, found.sha256) != (size, digest):
            return fault(
                f"its tar has changed since it was annotated: bring it back, or remove {name}.json to take it as it is"
            )
        _read(contents, path, data, classes, decode=found is None)
        text = "\n".join([f"{INDEX_VERSION} {len(contents.index)}", *contents.index, ""])
        contents.rows = None if contents.faults else shard_rows(data, text)
    if not contents.faults and not contents.keys:
        return fault("its tar holds no sample: remove it")
    index = text.encode()
    index_path = path.with_suffix(".idx")
    there = index_path.read_bytes() if index_path.exists() else None
    if found is None and there not in (None, index):
        return fault(f"beside it lies another program's {index_path.name}, which does not fit it: move it away")
    if contents.faults:
        return contents.report(split, name, None, kept=False)
    if there != index:
        write_atomically(index_path, index)
    if found is not None:
        return contents.report(split, name, found, kept=True)
    annotation = ShardAnnotation(
        name=name,
        samples=len(contents.keys),
        bytes=size,
        sha256=digest,
        inputs=digest,
        moments=contents.moments,
        rejected=(),
    )
    write_json(path.with_suffix(".json"), annotation.to_json())
    return contents.report(split, name, annotation, kept=False)


def _read(contents: _Contents, path: Path, data: mmap.mmap, classes: int | None, decode: bool) -> None:
    """Goes through a tar, to its end or to more faults than are shown."""
    for sample in read_samples(whole(path), data, contents.faults, contents.shard, MAX_FAULTS):
        wrong = _wrong_label(sample, classes)
        if not wrong and decode:
            try:
                contents.moments += RgbMoments.of(stored_pixels(sample.jpeg, grey=True))
            except ImageError as error:
                wrong = str(error)
        if wrong:
            contents.faults.append(Fault(wrong, contents.shard, sample.key))
            continue
        label = int(sample.label)
        wnid = stated_wnid(sample.key, sample.json)
        if wnid is not None:
            merge_stated(contents.wnids, {label: wnid})
        contents.labels.append(label)
        contents.keys.append(sample.key)
        contents.index.append(sample.index_line)
    if len(contents.faults) >= MAX_FAULTS:
        contents.faults.append(Fault("more of it may be wrong: the rest was not read", contents.shard))


def _wrong_label(sample: Sample, classes: int | None) -> str:
    """What is wrong with a sample's label; empty where nothing is."""
    if sample.number is not None and sample.number < (classes or MAX_CLASSES):
        return ""
    needed = f"--classes names {classes}" if classes else f"a label is a number below {MAX_CLASSES:,}"
    return f"its label is {sample.label[:20].decode(errors='replace')!r}, {needed}"
