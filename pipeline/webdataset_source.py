"""Another WebDataset as a source: tars of KEY.jpg and KEY.cls, read in place by the offsets of their members."""

from __future__ import annotations

import collections
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.dataset import DATASET_FILE, DatasetError, parse_dataset
from pipeline.source_files import LISTING_THREADS, Classes, File, SourceError, is_image_name, read_bytes
from pipeline.tar_source import Member, members, whole

LABEL_EXTENSION = ".cls"
_CURE = "give shards with an image and its .cls in each sample"

Labelled = tuple[int, File]
"""A label and its image."""


def shards_of(folder: Path) -> tuple[Path, ...]:
    """The tars that lie in a folder, sorted."""
    return tuple(sorted(path for path in folder.glob("*.tar") if not path.name.startswith(".") and path.is_file()))


def shards_by_split(folder: Path, shards: Sequence[Path]) -> dict[str, tuple[Path, ...]]:
    """The shards that lie in one folder, by split, as their names without numbers tell: all are train's where only one
    name is used, or those with "train" and those with "val" in their name.

    Raises:
        SourceError: if the names cannot be told apart, since validation images must not get into the training set.
    """
    groups = collections.defaultdict(list)
    for path in shards:
        groups[path.stem.rstrip("0123456789").rstrip("-_.")].append(path)
    if len(groups) == 1:
        return {"train": tuple(shards)}
    train = [name for name in groups if "train" in name]
    val = [name for name in groups if "val" in name and "train" not in name]
    if len(train) == len(val) == 1 and len(groups) == 2:
        return {"train": tuple(groups[train[0]]), "val": tuple(groups[val[0]])}
    raise SourceError(
        f"{folder} holds shards of {len(groups)} names, {', '.join(sorted(groups)[:4])}: "
        "put those to train on into train/ and those to validate on into val/"
    )


def class_names(folder: Path) -> tuple[str, ...] | None:
    """The class names that a `dataset.json` in or above a folder of shards gives, by label; None without one.

    Raises:
        SourceError: if there is one and it cannot be understood.
    """
    for path in (folder / DATASET_FILE, folder.parent / DATASET_FILE):
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            continue
        try:
            return tuple(label.wnid for label in parse_dataset(text, str(path)).classes)
        except DatasetError as error:
            raise SourceError(f"{error}; remove it to name the classes by their labels") from error
    return None


def read_shards(
    root: Path, shards: Sequence[Path], names: Sequence[str] | None
) -> tuple[Classes, int, tuple[str, ...]]:
    """The images of some shards by class, sorted by name, how many other files there are, and the names by label.

    Args:
        names: what each label is called; None for class_0000, class_0001, ..., which must be without a gap then.

    Raises:
        SourceError: for a sample without image or label, one that is there twice, a label without a name, or a gap.
        OSError: if a shard cannot be read.
    """
    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        listed = list(pool.map(_read_shard, shards))
    samples = [sample for found, _ in listed for sample in found]
    if not samples:
        raise SourceError(f"the {len(shards)} tars in {root} hold no image: {_CURE}")
    labels = {label for label, _ in samples}
    if names is None:
        missing = sorted(set(range(max(labels) + 1)) - labels)
        if missing:
            raise SourceError(
                f"{root} has labels up to {max(labels)} and none of {missing[0]} ({len(missing)} are missing): "
                "number the classes from 0 without a gap"
            )
        digits = max(4, len(str(max(labels))))
        names = [f"class_{label:0{digits}d}" for label in range(max(labels) + 1)]
    elif max(labels) >= len(names):
        raise SourceError(
            f"{root} has the label {max(labels)}, but its classes are {len(names)}, numbered from 0: "
            "give shards and the dataset.json or training shards that belong to them"
        )
    classes: Classes = {names[label]: [] for label in sorted(labels)}
    for label, file in samples:
        classes[names[label]].append(file)
    for files in classes.values():
        files.sort(key=lambda file: (file.name, file.path, file.member))
    return classes, sum(others for _, others in listed), tuple(names)


def _read_shard(path: Path) -> tuple[list[Labelled], int]:
    images: dict[str, Member] = {}
    labels: dict[str, Member] = {}
    others = 0
    for member in members(whole(path)):
        if member.hidden:
            continue
        folder, base = os.path.split(member.name)
        # A WebDataset key ends at the first dot of the last part of the name.
        stem, _, extension = base.partition(".")
        key = os.path.join(folder, stem)
        if is_image_name(f"x.{extension}"):
            kind = images
        elif f".{extension.lower()}" == LABEL_EXTENSION:
            kind = labels
        else:
            others += 1
            continue
        if key in kind:
            what = "image" if kind is images else "label"
            raise SourceError(f"{path} holds two {what}s of the sample {key!r}: {_CURE}")
        kind[key] = member
    for key in images.keys() ^ labels.keys():
        has, lacks = ("an image", f"no {LABEL_EXTENSION}") if key in images else (f"a {LABEL_EXTENSION}", "no image")
        raise SourceError(f"{path}: the sample {key!r} has {has} and {lacks}: {_CURE}")
    samples = []
    for key, member in images.items():
        text = read_bytes(str(path), labels[key].offset, labels[key].size).strip()
        if not text.isdigit():
            raise SourceError(f"{path}: the sample {key!r} has the label {text[:40]!r}: a label is a number from 0 on")
        samples.append((int(text), File(str(path), member.size, member.offset, member.name)))
    return samples, others
