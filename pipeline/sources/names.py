"""What names tell: an image's class, a folder's split, a shard's number, and what ImageNet's classes are called."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

# sha256 of the 1000 wnids of ILSVRC-2012, sorted, joined by line breaks. The lists that come with Caffe
# (synset_words.txt), with the devkit (by its ids) and with Keras (imagenet_class_index.json) agree on it.
_IMAGENET_WNIDS = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"

_WNID = re.compile(r"n\d{8}")
_FIRST_WNID = re.compile(r"(n\d{8})_")
_LAST_WNID = re.compile(r"_(n\d{8})$")
_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_SPLIT_WORD = re.compile(r"(?<![a-z])(train|training|val|valid|validation|test|testing)(?![a-z])")
_SERIES = re.compile(r"(.*?)(\d+)(-of-\d+)?")
_SHARD_WORD = re.compile(r"(?<![a-z])(shards?|parts?|chunks?|batch|data|images?)(?![a-z])")
PARTIAL = (".part", ".partial", ".filepart", ".crdownload", ".download", ".aria2", ".tmp")
"""What downloaders add to the name of a file that they have not finished."""
_COMPRESSED = (".tgz", ".tbz", ".tbz2", ".txz", ".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".7z", ".rar")


class Series(NamedTuple):
    """Where a shard's name stands among those of its set: train-000123.tar is number 123 of "train"."""

    prefix: str
    number: str
    """Its digits; empty for a name that does not end in a number."""
    total: str
    """"-of-00146", or empty."""


def is_wnid(name: str) -> bool:
    return _WNID.fullmatch(name) is not None


def wnid_in(name: str) -> str | None:
    """The wnid in an image's file name: the last part, as in Hugging Face's archives, or the first, as in ImageNet's.

    >>> wnid_in("ILSVRC2012_val_00000001_n01751747.JPEG"), wnid_in("n01440764_18.JPEG"), wnid_in("1.JPEG")
    ('n01751747', 'n01440764', None)
    """
    stem = os.path.splitext(name)[0]
    found = _LAST_WNID.search(stem) or _FIRST_WNID.match(stem)
    return found[1] if found else None


def folder_split(name: str) -> str | None:
    """Which split a folder's name is of: train, val or test."""
    return _SPLITS.get(name.lower())


def tar_split(stem: str) -> str | None:
    """Which split a tar's name has a word of."""
    found = _SPLIT_WORD.search(stem.lower())
    return _SPLITS[found[1]] if found else None


def is_tar_name(name: str) -> bool:
    return name.lower().endswith(".tar")


def is_unread_archive(name: str) -> bool:
    """Whether a file looks like data that cannot be read in place: compressed, or not fully downloaded."""
    return name.lower().endswith(_COMPRESSED + PARTIAL)


def series(stem: str) -> Series:
    found = _SERIES.fullmatch(stem)
    return Series(found[1].rstrip("-_."), found[2], found[3] or "") if found else Series(stem, "", "")


def missing_in_series(stems: Sequence[str]) -> str | None:
    """The first name that is missing among those of one prefix, which count from 0 or 1 on; None if there is none."""
    numbered = {int(one.number): stem for stem in stems if (one := series(stem)).number}
    if len(numbered) < 2:
        return None
    sample = numbered[min(numbered)]
    _, digits, total = series(sample)
    count = len(numbered) if not total else int(total.removeprefix("-of-"))
    start = 0 if 0 in numbered else 1
    for number in range(start, start + count):
        if number not in numbered:
            head = sample.removesuffix(total).removesuffix(digits)
            return f"{head}{number:0{len(digits)}d}{total}"
    return None


def are_shards(stems: Sequence[str]) -> bool:
    """Whether tars are numbered as parts of a set are, and not named as classes."""
    parts = [series(stem) for stem in stems]
    prefix = parts[0].prefix.lower()
    numbered = len({part.prefix for part in parts}) == 1 and all(part.number for part in parts)
    named = not prefix or tar_split(prefix) is not None or _SHARD_WORD.search(prefix) is not None
    return numbered and named and not is_wnid(stems[0])


def is_imagenet(wnids: Sequence[str]) -> bool:
    """Whether sorted class names are exactly ILSVRC-2012's thousand wnids."""
    text = "\n".join(wnids).encode("utf-8", "surrogateescape")
    return hashlib.sha256(text).hexdigest() == _IMAGENET_WNIDS


def names_of(wnids: Sequence[str]) -> tuple[str, ...]:
    """A name for each of the sorted class names, which is the same where no better one is known."""
    if not is_imagenet(wnids):
        return tuple(wnids)
    # Takes seconds to import, and only ImageNet itself needs it.
    from torchvision.models import AlexNet_Weights

    return tuple(str(name) for name in AlexNet_Weights.IMAGENET1K_V1.meta["categories"])
