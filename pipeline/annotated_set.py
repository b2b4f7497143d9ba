"""A shard set whose tars another program made: found, and given what training needs of it.

    SET/train/*.tar   SET/val/*.tar      WebDataset shards of KEY.cls and 256 x 256 KEY.jpg (or .jpeg)

gain an index and an annotation each, and the set its `dataset.json`, as if they had been sharded here. Nothing can be
left out of a tar that must stay as it is, so one bad sample refuses the set.
"""

from __future__ import annotations

import dataclasses
import mmap
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.annotate import AnnotatedShard
from pipeline.dataset import (
    DATASET_FILE,
    IMAGE_SIZE,
    SPLITS,
    ClassLabel,
    DatasetError,
    DatasetInfo,
    ShardRow,
    Split,
    read_dataset,
    shard_name,
    write_atomically,
    write_json,
)
from pipeline.decode import ImageError
from pipeline.label_names import LabelNames, contradiction, merge_stated, name_labels
from pipeline.pictures import write_pictures
from pipeline.rgb_stats import RgbMoments, RgbStatistics
from pipeline.sample_index import describe_index, index_file, index_is_whole, pack_index
from pipeline.shard_samples import Fault, read_samples, stored_pixels
from pipeline.shard_set import REJECTS_FILE, UNFINISHED_FILE, ShardSetError
from pipeline.source_files import SourceError
from pipeline.tar_source import whole
from pipeline.verify import repeated_keys
from pipeline.webdataset_source import prefix, shards_by_split

IMAGE_SETTINGS = {"size": IMAGE_SIZE, "format": "JPEG"}  # All that is known of images encoded elsewhere.


def find_shards(root: Path) -> list[tuple[str, str]]:
    """The (split, name) of each tar to annotate, the training split first.

    Raises:
        ShardSetError: if they do not lie in ROOT/train and ROOT/val, or ROOT is no set to annotate.
    """
    if (root / UNFINISHED_FILE).exists():
        raise ShardSetError(f"{root} holds a set that sharding has not finished: run that command again")
    if (root / DATASET_FILE).exists():
        try:
            made_here = not read_dataset(root).annotated
        except DatasetError as error:
            raise ShardSetError(f"{error}; or move it away, to have it written anew") from error
        if made_here:
            raise ShardSetError(
                f"{root} was sharded by this program and lacks nothing: "
                f"check it with python jobs/verify_shards.py --data {root}"
            )
    found = []
    for split in SPLITS:
        paths = _tars_in(root / split)
        if not paths:
            raise ShardSetError(f"{root} has no {split}/*.tar: {_layout_advice(root)}")
        for path in paths:
            try:
                found.append((split, shard_name(path.stem)))
            except ValueError as error:
                raise ShardSetError(f"{path}: {error}: rename it with letters, digits, - and _ alone") from error
    return found


def _tars_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith(".") and path.is_file())


def _layout_advice(root: Path) -> str:
    advice = "put the tars to train on into train/ and those to validate on into val/"
    try:
        groups = shards_by_split(str(root), {path.name: str(path) for path in _tars_in(root)})
    except SourceError:
        return advice
    if set(groups) != set(SPLITS):
        return advice
    moves = " && ".join(f"mv {shlex.quote(prefix(next(iter(tars))))}*.tar {split}/" for split, tars in groups.items())
    return f"{advice}: cd {shlex.quote(str(root))} && mkdir -p train val && {moves}"


def check_first_images(root: Path, shards: Sequence[tuple[str, str]]) -> None:
    """Looks at the first image of each split: a set of images of another size need not be read to its end.

    Raises:
        ShardSetError: if it is not what a shard set holds.
        OSError: if it cannot be read.
    """
    for split, name in dict(reversed(shards)).items():
        path = root / split / f"{name}.tar"
        if path.stat().st_size == 0:
            continue
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            sample = next(read_samples(whole(path), data, [], name), None)
        # Whatever else is wrong is told with the shard's other faults.
        if sample is None:
            continue
        try:
            stored_pixels(sample.jpeg, grey=True)
        except ImageError as error:
            raise ShardSetError(
                f"{path} begins with {sample.key}, and {error}: its bytes stay as they are, so {reshard_advice(root)}"
            ) from error


def reshard_advice(root: Path) -> str:
    """What to do with a set that cannot be used as it is."""
    return (
        "make another set of it, which resizes images and sets bad ones aside: "
        f"python jobs/shard_imagenet.py --source {shlex.quote(str(root))} --output OTHER"
    )


def describe(
    root: Path, shards: Sequence[AnnotatedShard], given: LabelNames | None
) -> tuple[DatasetInfo, LabelNames, list[Fault]]:
    """The set's description from its shards, all without faults, what its labels are called, and what is wrong with it.

    Args:
        given: the classes, where the user named them.

    Raises:
        ShardSetError: if labels are missing or are not what they are said to be.
    """
    faults: list[Fault] = []
    splits = {}
    stated: dict[str, dict[int, str]] = {split: {} for split in SPLITS}
    moments = RgbMoments()
    for split in SPLITS:
        mine = [shard for shard in shards if shard.split == split]
        faults += repeated_keys([f"{split}/{shard.name}" for shard in mine], [shard.key_hashes for shard in mine])
        rows = []
        for shard in mine:
            assert shard.annotation is not None
            rows.append(ShardRow(shard.name, shard.annotation.samples, shard.annotation.bytes, shard.annotation.sha256))
            merge_stated(stated[split], shard.wnids)
            if split == "train":
                moments += shard.annotation.moments
        part = Split(sum(row.samples for row in rows), sum(row.bytes for row in rows), tuple(rows))
        splits[split] = describe_index(part, _index(shards, split))
    names = given or name_labels(_count_classes(root, shards), stated["train"])
    faults += [
        Fault(
            f"its label is {len(shard.per_class) - 1}, and there are {len(names.wnids)} classes",
            f"{shard.split}/{shard.name}",
            shard.largest,
        )
        for shard in shards
        if len(shard.per_class) > len(names.wnids)
    ]
    for split in SPLITS:
        wrong = contradiction(names, stated[split])
        if wrong:
            raise ShardSetError(f"{root / split}: {wrong}: give shards and --classes that number the classes alike")
    info = DatasetInfo(
        classes=tuple(
            ClassLabel(label, wnid, name)
            for label, (wnid, name) in enumerate(zip(names.wnids, names.names, strict=True))
        ),
        splits=splits,
        image=IMAGE_SETTINGS,
        seed=0,
        rgb=RgbStatistics.of(moments),
        source_fingerprint="",
        set_aside=0,
    )
    # Its tars are their own source.
    return dataclasses.replace(info, source_fingerprint=info.fingerprint), names, faults


def _index(shards: Sequence[AnnotatedShard], split: str) -> bytes:
    return pack_index([shard.rows for shard in shards if shard.split == split and shard.rows is not None])


def _count_classes(root: Path, shards: Sequence[AnnotatedShard]) -> int:
    """How many classes the training labels number, which must be all from 0 on."""
    training = [shard for shard in shards if shard.split == "train"]
    count = max(len(shard.per_class) for shard in training)
    totals = np.zeros(count, np.int64)
    for shard in training:
        totals[: len(shard.per_class)] += shard.per_class
    missing = np.flatnonzero(totals == 0)
    if len(missing):
        top = max(training, key=lambda shard: len(shard.per_class))
        raise ShardSetError(
            f"{root} has training labels up to {count - 1} (of {top.largest} in {top.name}), but none of {missing[0]} "
            f"({len(missing):,} are missing): if that is meant, name every class in a file, --classes FILE"
        )
    if count < 2:
        raise ShardSetError(f"{root} has one class, at least 2 are needed: give the shards of all classes")
    return count


def begin(root: Path, shards: Sequence[tuple[str, str]]) -> None:
    """Takes back `dataset.json` where a shard that it lists is to be annotated anew: the set is unfinished again."""
    if any(not (root / split / f"{name}.json").exists() for split, name in shards):
        (root / DATASET_FILE).unlink(missing_ok=True)


def finish_annotated(root: Path, shards: Sequence[AnnotatedShard], info: DatasetInfo) -> bool:
    """Writes the set's own files, `dataset.json` last; False if they were there.

    Raises:
        OSError: if they cannot be written.
    """
    if (root / DATASET_FILE).exists():
        if read_dataset(root) == info and all(index_is_whole(root, *split) for split in info.splits.items()):
            return False
        (root / DATASET_FILE).unlink()
    for shard in shards:
        assert shard.annotation is not None
        path = root / shard.split / f"{shard.name}.json"
        write_json(path, dataclasses.replace(shard.annotation, rgb=info.rgb).to_json())
    for split in info.splits:
        write_atomically(root / index_file(split), _index(shards, split))
    write_atomically(root / REJECTS_FILE, b"")
    write_pictures(root, info)
    write_json(root / DATASET_FILE, info.to_json())
    return True
