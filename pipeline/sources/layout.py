"""How a source is laid out: where its splits lie, and which class each image is of.

A layout that is not fully understood is refused by name. A folder or tar is a class only if nothing speaks against it.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from pipeline.sources.file_table import Classes, FileTable
from pipeline.sources.files import IMAGE_EXTENSIONS, SourceError
from pipeline.sources.keys import stem_of
from pipeline.sources.names import (
    PARTIAL,
    are_shards,
    folder_split,
    is_wnid,
    missing_in_series,
    series,
    tar_split,
    wnid_in,
)
from pipeline.sources.tree import FORMS, Branch, Tree, read_all
from pipeline.sources.webdatasets import Names, Samples, by_class, names_beside, names_by_samples

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
_NAMED = 4  # So many names stand in a message.
_DEPTH, _WIDTH = 3, 20  # How far a message looks for the --source that would be right.


class Content(NamedTuple):
    """What a split holds."""

    classes: Classes
    others: collections.Counter[str]
    """How many files are no images, by extension."""
    names: Names | None = None
    """What a WebDataset's labels are called."""


class DepthError(SourceError):
    """Folders where images are expected: SOURCE may be too high, or too deep."""


# ---- Splits ----


def find_splits(root: Tree, val_where: str | None) -> tuple[Tree, Tree | None, list[str]]:
    """Where the images to train on lie, where those to validate on, and what lies beside them unread.

    The second is None where they are to be split off. What is unread is empty where all of `root` is to train on.

    Args:
        val_where: the validation images' own place, as `shown`; None to look for them in `root`.

    Raises:
        SourceError: if it cannot be told, or a part is missing.
    """
    root = _inner(root)
    groups: dict[str | None, list[Branch]] = collections.defaultdict(list)
    official = any(branch.name == TRAIN_TAR for branch in root.below)
    for branch in root.below:
        split = tar_split(branch.stem) if branch.is_tar else folder_split(branch.name)
        # Beside ImageNet's own tars lie others of the same source, such as that of task 3.
        if branch.is_tar and official and branch.name not in (TRAIN_TAR, VAL_TAR):
            split = "test"
        groups[split].append(branch)
    train, val, rest = groups["train"], groups["val"], groups[None]
    if not train and val and rest and all(branch.is_tar for branch in rest):
        train, rest = rest, []
        below = replace(root, below=tuple(train))
    elif not train or _is_class(train, val, rest):
        odd = [*val, *groups["test"]]
        if odd and rest:
            raise SourceError(
                f"{root.where} holds {odd[0].name!r} beside {rest[0].name!r}: "
                "give --source the folder of the training classes alone, and the others as --source-val"
            )
        return root, None, []
    else:
        below = _split(root, train, "--source")
    if train[0].is_tar and any(branch.is_tar for branch in rest):
        names = sorted({series(branch.stem).prefix for branch in (*train, *rest)})
        raise SourceError(
            f"{root.where} holds tars of {len(names)} names, {', '.join(names[:_NAMED])}: "
            "put those to train on into train/ and those to validate on into val/"
        )
    if val_where is not None:
        rest += val
        val = []
    elif not val:
        for name in root.archives:
            if tar_split(name) == "val":
                raise SourceError(f"{_unread(root, name)}, or give --source-val")
    branches = [branch for branch in (*groups["test"], *rest) if branch.where != val_where]
    unread = [branch.name if branch.is_tar else f"{branch.name}/" for branch in branches]
    unread += [*root.archives, *([f"{len(root.images):,} images"] if len(root.images) else [])]
    return below, _split(root, val, "--source-val") if val else None, unread


def _is_class(train: Sequence[Branch], val: Sequence[Branch], rest: Sequence[Branch]) -> bool:
    """Whether what is called train is a class beside others, as in COCO, and no split."""
    if len(train) != 1 or train[0].is_tar or val or not rest or any(is_wnid(branch.name) for branch in rest):
        return False
    return not train[0].tree.below


def _split(root: Tree, branches: Sequence[Branch], flag: str) -> Tree:
    """What lies in the folder, the tar or the shards of one split."""
    kinds = {(branch.is_tar, series(branch.stem).prefix if branch.is_tar else branch.name) for branch in branches}
    if len(kinds) > 1:
        names = ", ".join(branch.name for branch in branches[:_NAMED])
        raise SourceError(
            f"{root.where} holds {names}, which are of one split by their names: give {flag} the one that is meant"
        )
    for name in root.archives:
        if branches[0].is_tar and series(name.partition(".")[0]).prefix == series(branches[0].stem).prefix:
            _check_whole(replace(root, below=tuple(branches), archives=(name,)))
    if len(branches) == 1 and not (branches[0].is_tar and series(branches[0].stem).number):
        return branches[0].tree
    _check_series(root, branches)
    return Tree(root.where, root.folder, below=tuple(branches))


def _inner(tree: Tree) -> Tree:
    """A tree without the one folder that a tar was made of, as train/ in train.tar."""
    while tree.is_tar and len(tree.below) == 1 and not len(tree.images) and not tree.below[0].is_tar:
        tree = tree.below[0].tree
    return tree


def _check_series(tree: Tree, branches: Sequence[Branch]) -> None:
    """Raises SourceError if a shard is missing between the others of a folder."""
    missing = missing_in_series([branch.stem for branch in branches])
    # A pattern names what is meant.
    if missing is not None and "{" not in tree.where:
        raise SourceError(
            f"{tree.where} holds {len(branches)} shards, up to {branches[-1].name}, and not {missing}.tar: "
            "download it, or name those that are meant by a pattern, as NAME-{000000..000146}.tar"
        )


def _check_whole(tree: Tree) -> None:
    """Raises SourceError if a folder holds archives that cannot be read in place, and not as tars, too."""
    tars = {branch.name for branch in tree.below if branch.is_tar}
    for name in tree.archives:
        if name.lower().endswith(PARTIAL) or os.path.splitext(name)[0] not in tars:
            raise SourceError(_unread(tree, name))


def _unread(tree: Tree, name: str) -> str:
    return (
        f"{tree.where} holds {name!r}, which is compressed or not whole and cannot be read in place: "
        "unpack it or move it away"
    )


# ---- Classes ----


def read_classes(tree: Tree, flag: str, trained: Names | None = None) -> Content:
    """The images of a split by class.

    Args:
        flag: the argument that named it.
        trained: what a WebDataset's labels are called in the training set.

    Raises:
        DepthError: for folders in class folders.
        SourceError: for anything else that is not understood.
        OSError: if something cannot be read.
    """
    tree = _inner(tree)
    others = collections.Counter(tree.others)
    _check_whole(tree)
    if tree.samples is not None:
        return _of_shards(tree, [tree.samples], flag, trained)
    if not tree.below:
        if not len(tree.images):
            raise SourceError(f"{tree.where} holds {_count(others)} and no image: give {flag} {FORMS}")
        return Content(_by_file_names(tree, [tree], flag), others)
    tars = [branch for branch in tree.below if branch.is_tar]
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
    trees: Sequence[Tree] = read_all(tree.below)
    samples = [one.samples for one in trees if one.samples is not None]
    if samples:
        _check_shards(tree, trees)
        return _of_shards(tree, samples, flag, trained)
    trees = _without_middle([_inner(one) for one in trees])
    for one in trees:
        others.update(one.others)
        _check_class(one, kind)
    stems = [branch.stem for branch in tree.below]
    if tars and not all(map(is_wnid, stems)) and (are_shards(stems) or _share_wnids(trees)):
        return Content(_by_file_names(tree, trees, flag), others)
    _check_wnids(stems, trees, kind)
    return Content({stem: in_order(stem, one.images) for stem, one in zip(stems, trees, strict=True)}, others)


def read_flat(tree: Tree) -> Content:
    """The images of a folder or tar without classes, sorted by name, all of a class without a name.

    Raises:
        SourceError: if they do not lie beside each other.
    """
    tree = _inner(tree)
    if len(tree.below) == 1 and not len(tree.images):
        tree = tree.below[0].tree
    if tree.below or tree.samples or not len(tree.images):
        what = ("tars" if tree.below[0].is_tar else "folders") if tree.below else _count(tree.others)
        raise SourceError(
            f"{tree.where} holds {what} and no images beside each other: "
            "--val-labels is for those; leave it out for images in classes"
        )
    _check_whole(tree)
    return Content({"": in_order("", tree.images)}, collections.Counter(tree.others))


def in_order(name: str, files: FileTable) -> FileTable:
    """The images of a class, sorted by what their keys are made of."""
    keyed = [(stem_of(name, file), file, row) for row, file in enumerate(files.names())]
    order = [row for _, _, row in sorted(keyed)]
    return files.take(np.array(order, np.int64))


def right_source(tree: Tree, itself: bool = False) -> str | None:
    """The nearest folder or tar below `tree` that is laid out as a source; None if none is near.

    Args:
        itself: whether `tree` may be it.
    """
    level = [tree]
    for depth in range(_DEPTH):
        for one in level if depth or itself else ():
            splits = {tar_split(branch.stem) if branch.is_tar else folder_split(branch.name) for branch in one.below}
            first = [branch.tree for branch in one.below[:2]]
            if "train" in splits or (len(first) > 1 and all(len(some.images) and not some.below for some in first)):
                return one.where
        level = [branch.tree for one in level for branch in one.below[:_WIDTH] if not branch.is_tar][:_WIDTH]
    return None


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
    inner = [one.below[0].tree for one in trees]
    others = [collections.Counter(one.others) for one in trees]
    return [
        replace(one, others=count + collections.Counter(one.others)) for one, count in zip(inner, others, strict=True)
    ]


def _check_class(tree: Tree, kind: str) -> None:
    if tree.below:
        raise DepthError(
            f"the {kind} of images {tree.where} holds the {'tar' if tree.below[0].is_tar else 'folder'} "
            f"{tree.below[0].name!r}, whose images would be left out"
        )
    _check_whole(tree)
    if not len(tree.images):
        raise SourceError(
            f"the class {kind} {tree.where} holds {_count(tree.others)} and no image "
            f"({' '.join(sorted(IMAGE_EXTENSIONS))}): add its images or remove it"
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


def _share_wnids(trees: Sequence[Tree]) -> bool:
    """Whether images of one wnid, by their names, lie in several tars."""
    seen: set[str] = set()
    for tree in trees:
        mine = {wnid for name in tree.images.names() if (wnid := wnid_in(name)) is not None}
        if seen & mine:
            return True
        seen |= mine
    return False


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
        _check_series(tree, tree.below)
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
            f"{tree.where} holds shards of {len(prefixes)} names, {', '.join(prefixes[:_NAMED])}: "
            "put those to train on into train/ and those to validate on into val/"
        )
    _check_series(tree, tree.below)


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
