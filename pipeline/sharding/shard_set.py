"""The whole shard set while it is made, at a path or URL: what is done already, and how it is finished.

A folder with other things in it, or another set, is refused by name: nothing that this program did not write is ever
replaced.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.dataset.annotation import Reject, ShardAnnotation, ShardError, read_annotation
from pipeline.dataset.info import (
    DATASET_FILE,
    REJECTS_FILE,
    SPLITS,
    ClassLabel,
    DatasetInfo,
    ShardRow,
    Split,
    read_dataset,
    write_json,
)
from pipeline.dataset.sample_index import describe_index, index_file, index_is_whole, pack_index
from pipeline.images.rgb_stats import RgbMoments, RgbStatistics
from pipeline.sharding.claim import UNFINISHED_FILE, Claim, ShardSetError, differences, read_claim
from pipeline.sharding.pictures import PCA_FILE, SHEET_FILE, write_pictures
from pipeline.sharding.set_lock import LOCK_FILE
from pipeline.sharding.shards import BuiltShard, ShardPlan, shard_file
from pipeline.sources.listing import Listing
from pipeline.sources.stored_listing import LISTING_FILE
from pipeline.storage.locations import Location, is_url, join, shown
from pipeline.storage.remote import TEMPORARY_SUFFIX, delete, read, scan, write

REQUESTS = 16  # Small files read or written at a time: each waits on a disk's flush or on a network.


@dataclasses.dataclass(frozen=True)
class SetPlan:
    """What a set is to become."""

    listing: Listing
    image: dict[str, Any]
    """`encoder_settings`."""
    seed: int
    samples_per_shard: int
    shards: tuple[ShardPlan, ...]

    def settings(self) -> dict[str, Any]:
        """What must be the same for an unfinished set to be continued."""
        return {**self.image, "seed": self.seed, "samples_per_shard": self.samples_per_shard}

    @property
    def claim(self) -> Claim:
        return Claim(self.settings(), list(self.listing.roots), self.listing.fingerprint)


def with_encoder_of(root: Location, plan: SetPlan) -> SetPlan:
    """The plan with the encoder versions of the set in ROOT, finished or not, if there is one.

    An upgrade then changes nothing of what is there: versions matter where an image is encoded, and are compared there.
    """
    for name, field in ((UNFINISHED_FILE, "settings"), (DATASET_FILE, "image")):
        # What cannot be understood is refused by name where it is used.
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            encoder = dict(json.loads(read(join(root, name)))[field]["encoder"])
            return dataclasses.replace(plan, image={**plan.image, "encoder": encoder})
    return plan


def find_finished(root: Location, plan: SetPlan) -> DatasetInfo | None:
    """The set in ROOT if it is finished and is what `plan` would make; None if it is still to be made or repaired.

    Raises:
        ShardSetError: if ROOT holds another finished set.
        DatasetError: if ROOT's dataset.json cannot be understood.
    """
    if DATASET_FILE not in _names(root):
        return None
    info, whole = _compare_finished(root, plan)
    return info if whole else None


def is_left_over(root: Location) -> bool:
    """Whether a job still works on the finished set in ROOT, or was killed between its last file and its end."""
    return not _names(root).isdisjoint((UNFINISHED_FILE, LOCK_FILE))


def tidy(root: Location, info: DatasetInfo, report: Callable[[str], None]) -> None:
    """Draws the pictures of a set that has its `dataset.json`, and removes what only the making of it needed.

    Args:
        report: told if there are no pictures, and why.
    """
    try:
        write_pictures(root, info)
    # matplotlib and Pillow raise whatever a font or a user's settings lead them to, and a picture only informs.
    except Exception as error:
        report(
            f"warning: the set is finished, without {SHEET_FILE} and {PCA_FILE}, which could not be drawn "
            f"({type(error).__name__}: {' '.join(str(error).split())})"
        )
    _remove_passing(root)
    delete(join(root, UNFINISHED_FILE))


def _compare_finished(root: Location, plan: SetPlan) -> tuple[DatasetInfo, bool]:
    """Reads the finished set in ROOT, which must be what `plan` would make, and whether no file of it is missing.

    Raises:
        ShardSetError: if ROOT holds another finished set.
        DatasetError: if ROOT's dataset.json cannot be understood.
    """
    info = read_dataset(root)
    now = {name: value for name, value in plan.settings().items() if name != "samples_per_shard"}
    different = differences({**info.image, "seed": info.seed}, now, info.source_fingerprint == plan.listing.fingerprint)
    whole = True
    # Where one of these differs every shard does: the samples per shard would be blamed for it.
    if not different:
        # Of a set that was left finished, the first shard of each split tells how all were dealt.
        shards = [next(shard for shard in plan.shards if shard.split == split) for split in plan.listing.splits]
        annotations = [_read_or_none(root, shard) for shard in shards]
        if None in annotations or is_left_over(root):
            shards = list(plan.shards)
            with ThreadPoolExecutor(REQUESTS) as pool:
                annotations = list(pool.map(lambda shard: _read_or_none(root, shard), shards))
        found = [(shard, annotation) for shard, annotation in zip(shards, annotations, strict=True) if annotation]
        # Source and seed are the same, so only another size of shards gives one another number of images.
        dealt_alike = all(
            len(shard.entries) == annotation.samples + len(annotation.rejected) for shard, annotation in found
        )
        rows = [(split, row) for split, content in info.splits.items() for row in content.shards]
        if not dealt_alike or not {row.name for _, row in rows} <= {shard.name for shard in plan.shards}:
            different = "samples per shard"
        missing = [row for split, part in info.splits.items() for row in _missing(root, split, part.shards)]
        # A repair that was killed leaves annotations without the set's PCA.
        whole = not missing and all(annotation is not None and annotation.rgb for annotation in annotations)
        whole = whole and all(index_is_whole(root, split, part) for split, part in info.splits.items())
    if different:
        raise ShardSetError(
            f"{shown(root)} holds a finished set of another {different}: "
            f"give another --output, or delete {shown(root)} first"
        )
    return info, whole


def make_folder(root: Location) -> None:
    """Makes sure that there is a folder ROOT; a store needs none.

    Raises:
        ShardSetError: if it cannot be made.
    """
    if is_url(root):
        return
    try:
        os.makedirs(root, exist_ok=True)
    except OSError as error:
        raise ShardSetError(f"cannot make the folder {root}: {error.strerror}; give another --output") from error


def check_folder(root: Location) -> None:
    """Raises ShardSetError if ROOT holds anything else than a set, finished or not."""
    names = _names(root)
    foreign = sorted(name for name in names if not _is_passing(name))
    if foreign and names.isdisjoint((UNFINISHED_FILE, DATASET_FILE)):
        raise ShardSetError(
            f"{shown(root)} holds {foreign[0]!r} and no shard set of this program: give --output a new or empty folder"
        )


def claim_folder(root: Location, plan: SetPlan) -> None:
    """Makes ROOT ready for the set's shards: a new or empty folder, or one where the same set was begun.

    Shards of an earlier state of the source are built again by `build_shard`; those beyond the plan are removed here.

    Raises:
        ShardSetError: if ROOT holds anything else.
        OSError: if ROOT cannot be written.
    """
    make_folder(root)
    check_folder(root)
    mine, there = plan.claim, read_claim(root)
    if there is not None:
        # The same folder with a repaired or added image continues; another folder is more likely a mistake.
        same_source = there.source_fingerprint == mine.source_fingerprint or there.roots == mine.roots
        if different := differences(there.settings, mine.settings, same_source):
            raise ShardSetError(
                f"{shown(root)} holds an unfinished set of another {different}: "
                f"go on with the same, give another --output, or delete {shown(root)} first"
            )
    # A dataset.json stays: it is of the same set, which lacks a file.
    mine.write(root)
    _remove_passing(root)
    planned = {shard.name for shard in plan.shards}
    for split in SPLITS:
        for name in _names(join(root, split)):
            stem, extension = os.path.splitext(name)
            if extension in (".tar", ".idx", ".json") and stem.startswith(f"{split}-") and stem not in planned:
                delete(join(root, split, name))


def finish(
    root: Location,
    plan: SetPlan,
    built: Sequence[BuiltShard],
    max_bad_fraction: float,
    report: Callable[[str], None] = print,
) -> DatasetInfo:
    """Merges the shards' moments and rows and writes the set's own files: `dataset.json` last, but for the pictures.

    Args:
        built: one for each of `plan.shards`, in the same order.
        max_bad_fraction: how much of the whole set may be set aside.
        report: told if the pictures could not be drawn.

    Raises:
        ShardSetError: if too many images were set aside or a split has none left; `rejects.jsonl` is written then, and
            `dataset.json` is not.
    """
    annotations = [shard.annotation for shard in built]
    assert [annotation.name for annotation in annotations] == [shard.name for shard in plan.shards]
    pairs = list(zip(plan.shards, annotations, strict=True))
    rejected = sorted(
        (reject for annotation in annotations for reject in annotation.rejected), key=lambda r: (r.split, r.path)
    )
    lines = "".join(json.dumps(reject.to_json()) + "\n" for reject in rejected)
    plan.claim.check(root)
    write(join(root, REJECTS_FILE), lines.encode())
    _check_rejected(root, rejected, plan.listing.images, max_bad_fraction)

    splits = {}
    for name in plan.listing.splits:
        rows = [
            ShardRow(a.name, a.samples, a.bytes, a.sha256) for shard, a in pairs if shard.split == name and a.samples
        ]
        if not rows:
            raise ShardSetError(
                f"every {name} image was set aside, the first reason: {rejected[0].reason}; "
                f"see {shown(join(root, REJECTS_FILE))}"
            )
        if missing := _missing(root, name, rows):
            raise ShardSetError(
                f"{shown(join(root, name, missing[0].name))}.tar was written but is not here: "
                "--output must be a URL, or lie on a disk that all nodes share"
            )
        indexed = [
            one.rows for shard, one in zip(plan.shards, built, strict=True) if shard.split == name and len(one.rows)
        ]
        index = pack_index(indexed)
        write(join(root, index_file(name)), index)
        split = Split(sum(row.samples for row in rows), sum(row.bytes for row in rows), tuple(rows))
        splits[name] = describe_index(split, index)

    training = sum((a.moments for shard, a in pairs if shard.split == "train"), RgbMoments())
    rgb = RgbStatistics.of(training)

    def annotate(shard: ShardPlan, annotation: ShardAnnotation) -> None:
        write_json(shard_file(root, shard, "json"), dataclasses.replace(annotation, rgb=rgb).to_json())

    with ThreadPoolExecutor(REQUESTS) as pool:
        list(pool.map(annotate, plan.shards, annotations))
    info = DatasetInfo(
        classes=tuple(
            ClassLabel(index, wnid, name)
            for index, (wnid, name) in enumerate(zip(plan.listing.classes, plan.listing.class_names, strict=True))
        ),
        splits=splits,
        image=plan.image,
        seed=plan.seed,
        rgb=rgb,
        source_fingerprint=plan.listing.fingerprint,
        set_aside=len(rejected),
    )
    write_json(join(root, DATASET_FILE), info.to_json())
    tidy(root, info, report)
    return info


def _check_rejected(root: Location, rejected: Sequence[Reject], images: int, max_bad_fraction: float) -> None:
    if len(rejected) / images > max_bad_fraction:
        raise ShardSetError(
            f"{len(rejected)} of {images} images are bad, more than --max-bad-fraction {max_bad_fraction} allows; "
            f"the first is {rejected[0].path}: {rejected[0].reason}. {shown(join(root, REJECTS_FILE))} lists them: "
            f"repair or remove them, or give --max-bad-fraction {math.ceil(len(rejected) / images * 100) / 100}, "
            "and run again"
        )


def _read_or_none(root: Location, shard: ShardPlan) -> ShardAnnotation | None:
    try:
        return read_annotation(shard_file(root, shard, "json"))
    except (FileNotFoundError, ShardError):
        return None


def _missing(root: Location, split: str, rows: Iterable[ShardRow]) -> list[ShardRow]:
    """The shards whose tar is not there or has another size, or whose index or annotation is not there."""
    sizes = {item.name: item.size for item in scan(join(root, split), missing_ok=True)}
    return [
        row
        for row in rows
        if sizes.get(f"{row.name}.tar") != row.bytes or not {f"{row.name}.idx", f"{row.name}.json"} <= sizes.keys()
    ]


def _names(folder: Location) -> set[str]:
    """Of what lies in a folder that may not be there."""
    return {item.name for item in scan(folder, missing_ok=True)}


def _is_passing(name: str) -> bool:
    """Whether a name is of a file that was being written, or of a job's lock or its source's listing."""
    return name in (LOCK_FILE, LISTING_FILE) or (name.startswith(".") and name.endswith(TEMPORARY_SUFFIX))


def _remove_passing(root: Location) -> None:
    """Removes what was being written to a disk when a job or a worker was killed."""
    if is_url(root):
        return
    for folder in (Path(root), *(Path(root) / split for split in SPLITS)):
        for path in sorted(folder.glob(f".*{TEMPORARY_SUFFIX}")):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
