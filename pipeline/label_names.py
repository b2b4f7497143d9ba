"""What the numbers in a WebDataset's .cls files stand for, where its tars were made elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pipeline.class_names import IMAGENET_CLASSES, imagenet_names, names_of
from pipeline.source_files import SourceError

CONFLICT = ""  # In place of a wnid: the samples of one label name several.
_WNID = re.compile(r"n\d{8}(?!\d)")
# Where the .json of a sample may hold its wnid: alone, or at the start of ImageNet's file name.
_FIELDS = ("wnid", "synset", "filename", "__key__")


class LabelNames(NamedTuple):
    """A wnid and a name for each label."""

    wnids: tuple[str, ...]
    names: tuple[str, ...]
    reason: str
    """Where they come from, for the user."""


def read_label_names(path: Path) -> LabelNames:
    """Reads a text file with a class a line, in the order of the labels: a wnid, and its name if there is one.

    Raises:
        SourceError: if it cannot be read, has an empty line or a wnid twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(
            f"--classes {path} cannot be read ({error}): give a text file with 'wnid name' a line"
        ) from error
    pairs = [[*line.split(maxsplit=1), "", ""][:2] for line in lines]
    wnids = tuple(wnid for wnid, _ in pairs)
    if len(lines) < 2 or "" in wnids or len(set(wnids)) < len(wnids):
        raise SourceError(
            f"--classes {path} has {len(lines)} lines with {len(set(wnids) - {''})} wnids: "
            "give one line for each of at least 2 classes, 'wnid' or 'wnid name', in the order of the labels"
        )
    known = names_of(wnids)
    names = tuple(name.strip() or other for (_, name), other in zip(pairs, known, strict=True))
    return LabelNames(wnids, names, f"as in {path}")


def stated_wnid(key: str, note: bytes) -> str | None:
    """The wnid that a sample's .json or else its key begins with, as ImageNet's file names do; None without one."""
    try:
        fields = json.loads(note) if note else {}
    except ValueError:
        fields = {}
    texts = [fields.get(field) for field in _FIELDS] if isinstance(fields, dict) else []
    for text in (*texts, key.rpartition("/")[2]):
        found = _WNID.match(text) if isinstance(text, str) else None
        if found:
            return found.group()
    return None


def merge_stated(known: dict[int, str], more: Mapping[int, str]) -> None:
    """Adds the wnids that some samples state for their labels to `known`; CONFLICT where they disagree."""
    for label, wnid in more.items():
        if known.setdefault(label, wnid) != wnid:
            known[label] = CONFLICT


def name_labels(count: int, stated: Mapping[int, str]) -> LabelNames:
    """Names for labels 0 to count - 1 that no file explains.

    Args:
        stated: the wnids that the training samples state.
    """
    wnids = tuple(stated.get(label, CONFLICT) for label in range(count))
    if CONFLICT not in wnids and len(set(wnids)) == count:
        return LabelNames(wnids, names_of(wnids), "the wnids that the samples' keys or .json state")
    digits = max(4, len(str(count - 1)))
    numbers = tuple(f"class_{label:0{digits}d}" for label in range(count))
    if count == IMAGENET_CLASSES and CONFLICT not in stated.values():
        return LabelNames(numbers, imagenet_names(), "ImageNet's names in their usual order, as there are 1000 classes")
    return LabelNames(numbers, numbers, "numbers, as the samples do not name each class by one wnid")


def contradiction(names: LabelNames, stated: Mapping[int, str]) -> str:
    """Says where samples state another wnid for their label than it has; empty where none does."""
    for label, wnid in sorted(stated.items()):
        # A label beyond the names is told with its sample.
        if label < len(names.wnids) and wnid != names.wnids[label] and _WNID.fullmatch(names.wnids[label]):
            said = "several" if wnid == CONFLICT else wnid
            return f"the label {label} is {names.wnids[label]} ({names.reason}), but its samples say {said}"
    return ""
