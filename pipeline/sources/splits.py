"""Where in a source the images to train on lie, and where those to validate on."""

from __future__ import annotations

import collections
import os
from collections.abc import Sequence
from dataclasses import replace

from pipeline.sources.files import NAMED, SourceError
from pipeline.sources.names import PARTIAL, folder_split, is_wnid, missing_in_series, series, tar_split
from pipeline.sources.tree import Branch, Tree

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"


def find_splits(root: Tree, val_where: str | None) -> tuple[Tree, Tree | None, list[str]]:
    """Where the images to train on lie, where those to validate on, and what lies beside them unread.

    The second is None where they are to be split off. What is unread is empty where all of `root` is to train on.

    Args:
        val_where: the validation images' own place, as `shown`; None to look for them in `root`.

    Raises:
        SourceError: if it cannot be told, or a part is missing.
    """
    root = inner(root)
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
            f"{root.where} holds tars of {len(names)} names, {', '.join(names[:NAMED])}: "
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
        names = ", ".join(branch.name for branch in branches[:NAMED])
        raise SourceError(
            f"{root.where} holds {names}, which are of one split by their names: give {flag} the one that is meant"
        )
    for name in root.archives:
        if branches[0].is_tar and series(name.partition(".")[0]).prefix == series(branches[0].stem).prefix:
            check_whole(replace(root, below=tuple(branches), archives=(name,)))
    if len(branches) == 1:
        return branches[0].tree
    check_series(root, branches)
    return Tree(root.where, root.folder, below=tuple(branches))


def inner(tree: Tree) -> Tree:
    """A tree without the one folder that a tar was made of, as train/ in train.tar."""
    while tree.is_tar and len(tree.below) == 1 and not (len(tree.images) or tree.archives or tree.below[0].is_tar):
        tree = tree.below[0].tree
    return tree


def check_series(tree: Tree, branches: Sequence[Branch]) -> None:
    """Raises SourceError if a shard is missing between the others of a folder."""
    missing = missing_in_series([branch.stem for branch in branches])
    # A pattern names what is meant.
    if missing is not None and "{" not in tree.where:
        raise SourceError(
            f"{tree.where} holds {len(branches)} shards, up to {branches[-1].name}, and not {missing}.tar: "
            "download it, or name those that are meant by a pattern, as NAME-{000000..000146}.tar"
        )


def check_whole(tree: Tree) -> None:
    """Raises SourceError if a folder holds archives that cannot be read in place, and not as tars, too."""
    tars = {branch.name for branch in tree.below if branch.is_tar}
    for name in tree.archives:
        if name.lower().endswith(PARTIAL) or os.path.splitext(name)[0] not in tars:
            raise SourceError(_unread(tree, name))


def _unread(tree: Tree, name: str) -> str:
    return (
        f"{tree.where} holds {name!r}, which is compressed or not whole and cannot be read in place: "
        "unpack it (gunzip, unzip), download what is missing, or move it away"
    )
