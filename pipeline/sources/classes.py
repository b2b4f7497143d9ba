"""Which class each image of a split is of.

A layout that is not fully understood is refused by name. A folder or tar is a class only if nothing speaks against it.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from pipeline.sources.file_table import Classes, FileTable
from pipeline.sources.files import IMAGE_EXTENSIONS, NAMED, SourceError
from pipeline.sources.keys import stem_of
from pipeline.sources.names import are_shards, folder_split, is_wnid, series, tar_split, wnid_in
from pipeline.sources.splits import check_series, check_whole, inner
from pipeline.sources.tree import FORMS, Branch, Tree, read_all
from pipeline.sources.webdatasets import Names, Samples, by_class, names_beside, names_by_samples

_DEPTH, _WIDTH = 5, 20  # How far a message looks for the --source that would be right.


class Content(NamedTuple):
    """What a split holds."""

    classes: Classes
    others: collections.Counter[str]
    """How many files are no images, by extension."""
    names: Names | None = None
    """What a WebDataset's labels are called."""


ReadAll = Callable[[Sequence[Branch]], Iterator[Tree]]


class DepthError(SourceError):
    """Folders where images are expected: SOURCE may be too high, or too deep."""


def read_classes(tree: Tree, flag: str, trained: Names | None = None, read: ReadAll = read_all) -> Content:
    """The images of a split by class.

    Args:
        flag: the argument that named it.
        trained: what a WebDataset's labels are called in the training set.
        read: reads what lies in many folders or tars.

    Raises:
        DepthError: for folders in class folders.
        SourceError: for anything else that is not understood.
        OSError: if something cannot be read.
    """
    tree = inner(tree)
    others = collections.Counter(tree.others)
    check_whole(tree)
    if tree.samples is not None:
        return _of_shards(tree, [tree.samples], flag, trained)
    if not tree.below:
        if not len(tree.images):
            raise SourceError(f"{tree.where} holds {_count(others)} and no image: give {flag} {FORMS}")
        return Content(_by_file_names(tree, [tree], flag), others)
    tars = [branch for branch in tree.below if branch.is_tar]
    if len(tree.below) == len(tars) == 1 and not len(tree.images):
        return read_classes(tars[0].tree, flag, trained, read)
    kind = "tar" if tars else "folder"
    if len(tree.images) or 0 < len(tars) < len(tree.below):
        folder = next((branch.name for branch in tree.below if not branch.is_tar), None)
        found = [f"the class folder {folder!r}"] if folder else []
        found += [f"the tar {tars[0].name!r}"] if tars else []
        if len(tree.images):
            found.append(f"{len(tree.images):,} images of no class, such as {next(tree.images.names())!r},")
        raise SourceError(
            f"{tree.where} holds {' and '.join(found)} beside each other: give {flag} class folders or class tars "
            "alone (was a script that sorts them stopped half way? Run it to its end, or move away what is no class)"
        )
    trees: Sequence[Tree] = list(read(tree.below))
    samples = [one.samples for one in trees if one.samples is not None]
    if samples:
        _check_shards(tree, trees)
        return _of_shards(tree, samples, flag, trained)
    trees = _without_middle([inner(one) for one in trees])
    for one in trees:
        others.update(one.others)
        _check_class(one, kind)
    stems = [branch.stem for branch in tree.below]
    if tars and are_shards(stems):
        return Content(_by_file_names(tree, trees, flag), others)
    if tars:
        _check_no_shards(stems, trees)
    _check_wnids(stems, trees, kind)
    return Content({stem: in_order(stem, one.images) for stem, one in zip(stems, trees, strict=True)}, others)


def read_flat(tree: Tree) -> Content:
    """The images of a folder or tar without classes, sorted by name, all of a class without a name.

    Raises:
        SourceError: if they do not lie beside each other.
    """
    tree = inner(tree)
    if len(tree.below) == 1 and not len(tree.images):
        check_whole(tree)
        tree = tree.below[0].tree
    if tree.below or tree.samples or not len(tree.images):
        what = ("tars" if tree.below[0].is_tar else "folders") if tree.below else _count(tree.others)
        raise SourceError(
            f"{tree.where} holds {what} and no images beside each other: "
            "--val-labels is for those; leave it out for images in classes"
        )
    check_whole(tree)
    return Content({"": in_order("", tree.images)}, collections.Counter(tree.others))


def in_order(name: str, files: FileTable) -> FileTable:
    """The images of a class, sorted by what their keys are made of."""
    keyed = [(stem_of(name, file), file, row) for row, file in enumerate(files.names())]
    order = [row for _, _, row in sorted(keyed)]
    return files.take(np.array(order, np.int64))


def right_source(tree: Tree, itself: bool = False) -> str | None:
    """The nearest folder below `tree` that is laid out as a source; None if none is near.

    Args:
        itself: whether `tree` may be it.
    """
    level = [tree]
    for depth in range(_DEPTH):
        for one in level if depth or itself else ():
            train = [branch for branch in one.below if "train" in (tar_split(branch.stem), folder_split(branch.name))]
            if _holds_classes(one) or any(branch.is_tar or _holds_classes(branch.tree) for branch in train):
                return one.where
        level = [branch.tree for one in level for branch in one.below[:_WIDTH] if not branch.is_tar][:_WIDTH]
    return None


def _holds_classes(tree: Tree) -> bool:
    """Whether the first folders in a folder hold images, each by itself or in a folder of its own, or all are tars."""
    lower = [None if branch.is_tar else branch.tree for branch in tree.below[:2]]
    lower = [one.below[0].tree if one and len(one.below) == 1 and not len(one.images) else one for one in lower]
    return len(lower) > 1 and all(one is None or (len(one.images) and not one.below) for one in lower)


def _count(others: Mapping[str, int]) -> str:
    return f"{sum(others.values()) or 'no'} files"


def _without_middle(trees: Sequence[Tree]) -> Sequence[Tree]:
    """The folders that hold the images, where each class keeps them in a folder of one name, as Tiny ImageNet does."""
    middle = {tuple(branch.name for branch in one.below) for one in trees}
    names = next(iter(middle))
    if len(middle) > 1 or len(names) != 1 or any(len(one.images) for one in trees):
        return trees
    if is_wnid(names[0]) or folder_split(names[0]) is not None or len(trees) < 2:
        return trees
    for one in trees:
        check_whole(one)
    lower = [one.below[0].tree for one in trees]
    others = [collections.Counter(one.others) for one in trees]
    return [
        replace(one, others=count + collections.Counter(one.others)) for one, count in zip(lower, others, strict=True)
    ]


def _check_class(tree: Tree, kind: str) -> None:
    if tree.below:
        raise DepthError(
            f"the {kind} of images {tree.where} holds the {'tar' if tree.below[0].is_tar else 'folder'} "
            f"{tree.below[0].name!r}, whose images would be left out"
        )
    check_whole(tree)
    if not len(tree.images):
        raise SourceError(
            f"the class {kind} {tree.where} holds {_count(tree.others)} and no image "
            f"({' '.join(sorted(IMAGE_EXTENSIONS))}): add its images or remove it"
        )


def _check_no_shards(stems: Sequence[str], trees: Sequence[Tree]) -> None:
    """Makes sure that no tar is the shard of a set that tells classes by something else than .cls."""
    for stem, tree in zip(stems, trees, strict=True):
        for extension in (".json", ".txt"):
            if 2 * tree.others.get(extension, 0) > len(tree.images) and not is_wnid(stem):
                raise SourceError(
                    f"{tree.where} holds a {extension} for most of its images, as a shard does and a class does not: "
                    f"give shards with an image and its .cls in each sample, or class tars without {extension}"
                )


def _check_wnids(stems: Sequence[str], trees: Sequence[Tree], kind: str) -> None:
    """Makes sure that no image's name is of another class."""
    owner: dict[str, str] = {}
    for stem, tree in zip(stems, trees, strict=True):
        for name in tree.images.names():
            # Nearly all of ImageNet's, at a fraction of the time.
            if name.startswith(f"{stem}_"):
                continue
            wnid = wnid_in(name)
            if wnid is None or wnid == stem:
                continue
            if is_wnid(stem) or owner.setdefault(wnid, tree.where) != tree.where:
                other = owner.get(wnid, wnid)
                raise SourceError(
                    f"the class {kind} {tree.where} holds {name!r}, which by its name belongs to {other}: "
                    "move it there, or rename it"
                )


def _by_file_names(tree: Tree, trees: Sequence[Tree], flag: str) -> Classes:
    """The images of flat folders or tars by the wnids in their names, as in Hugging Face's archives."""
    table = FileTable.joined([one.images for one in trees])
    rows = collections.defaultdict(list)
    for row, name in enumerate(table.names()):
        wnid = wnid_in(name)
        if wnid is None:
            cure = (
                "name these with --val-labels, a text file with the wnid of each image, or its id in the devkit, in "
                "the order of their names, or with 'name class' rows"
                if flag == "--source-val"
                else f"give {flag} {FORMS}"
            )
            raise SourceError(
                f"{tree.where} holds images and not their classes, which neither folders nor names such as {name!r} "
                f"tell: {cure}"
            )
        rows[wnid].append(row)
    if len(trees) > 1:
        check_series(tree, tree.below)
    return {wnid: in_order(wnid, table.take(np.array(mine))) for wnid, mine in rows.items()}


# ---- Shards ----


def _check_shards(tree: Tree, trees: Sequence[Tree]) -> None:
    """Makes sure that a folder holds the shards of one split, and all of them."""
    for branch, one in zip(tree.below, trees, strict=True):
        if one.samples is None:
            raise SourceError(f"{branch.where} holds no .cls, as the shards beside it do: give shards of one set")
    prefixes = sorted({series(branch.stem).prefix for branch in tree.below})
    if len(prefixes) > 1:
        raise SourceError(
            f"{tree.where} holds shards of {len(prefixes)} names, {', '.join(prefixes[:NAMED])}: "
            "put those to train on into train/ and those to validate on into val/"
        )
    check_series(tree, tree.below)


def _of_shards(tree: Tree, shards: Sequence[Samples], flag: str, trained: Names | None) -> Content:
    names = names_beside(tree.folder) or trained or names_by_samples(shards)
    if names is None and flag == "--source-val":
        raise SourceError(
            f"{tree.where} numbers its classes and --source names them: give shards for both, or class folders for both"
        )
    classes, names = by_class(tree.where, shards, names)
    others: collections.Counter[str] = collections.Counter()
    for shard in shards:
        others.update(shard.others)
    return Content({name: in_order(name, files) for name, files in classes.items()}, others, names)
