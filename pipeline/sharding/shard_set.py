"""Whether a shard set is finished already, and how it is finished."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from pipeline.dataset.annotation import Reject, ShardAnnotation, ShardError, read_annotation
from pipeline.dataset.info import (
    DATASET_FILE,
    REJECTS_FILE,
    ClassLabel,
    DatasetInfo,
    ShardRow,
    Split,
    read_dataset,
    write_json,
)
from pipeline.dataset.sample_index import describe_index, index_file, index_is_whole, pack_index
from pipeline.images.rgb_stats import RgbMoments, RgbStatistics
from pipeline.sharding.claim import UNFINISHED_FILE, ShardSetError, differences
from pipeline.sharding.contact_sheet import SHEET_FILE, write_contact_sheet
from pipeline.sharding.set_folder import is_left_over, names_in, remove_passing
from pipeline.sharding.shard_plan import SetPlan, ShardPlan, shard_file
from pipeline.sharding.shards import BuiltShard
from pipeline.storage.locations import Location, join, shown
from pipeline.storage.remote import delete, scan, write

REQUESTS = 16  # Small files read or written at a time: each waits on a disk's flush or on a network.


def find_finished(root: Location, plan: SetPlan) -> DatasetInfo | None:
    """The set in ROOT if it is finished and is what `plan` would make; None if it is still to be made or repaired.

    Raises:
        ShardSetError: if ROOT holds another finished set.
        DatasetError: if ROOT's dataset.json cannot be understood.
    """
    if DATASET_FILE not in names_in(root):
        return None
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
        # Source and seed are the same, so only another size of shards gives one another number of images.
        dealt_alike = all(
            len(shard.entries) == annotation.samples + len(annotation.rejected)
            for shard, annotation in zip(shards, annotations, strict=True)
            if annotation
        )
        # A lost annotation's row tells at least how many images the shard holds.
        planned = {shard.name: len(shard.entries) for shard in plan.shards}
        rows = [row for part in info.splits.values() for row in part.shards]
        if not dealt_alike or any(row.samples > planned.get(row.name, 0) for row in rows):
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
    return info if whole else None


def tidy(root: Location, info: DatasetInfo, report: Callable[[str], None]) -> None:
    """Draws the contact sheet of a set that has its `dataset.json`, and removes what only the making of it needed.

    Args:
        report: told if there is no contact sheet, and why.
    """
    try:
        write_contact_sheet(root, info)
    # Pillow raises whatever a font leads it to, and a picture only informs.
    except Exception as error:
        report(
            f"warning: the set is finished, without {SHEET_FILE}, which could not be drawn "
            f"({type(error).__name__}: {' '.join(str(error).split())})"
        )
    remove_passing(root)
    delete(join(root, UNFINISHED_FILE))


def finish(
    root: Location,
    plan: SetPlan,
    built: Sequence[BuiltShard],
    report: Callable[[str], None] = print,
) -> DatasetInfo:
    """Merges the shards' moments and rows and writes the set's own files: `dataset.json` last, then the contact sheet.

    Args:
        built: one for each of `plan.shards`, in the same order.
        report: told if the contact sheet could not be drawn.

    Raises:
        ShardSetError: if a split has no image left; `rejects.jsonl` is written then, and `dataset.json` is not.
    """
    annotations = [shard.annotation for shard in built]
    assert [annotation.name for annotation in annotations] == [shard.name for shard in plan.shards]
    rejected = _rejects(built)
    _write_rejects(root, plan, rejected)

    splits = {}
    for name in plan.listing.splits:
        full = [b for s, b in zip(plan.shards, built, strict=True) if s.split == name and b.annotation.samples]
        rows = [ShardRow(a.name, a.samples, a.bytes, a.sha256) for a in (one.annotation for one in full)]
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
        index = pack_index([one.rows for one in full])
        write(join(root, index_file(name)), index)
        split = Split(sum(row.samples for row in rows), sum(row.bytes for row in rows), tuple(rows))
        splits[name] = describe_index(split, index)

    training = (a.moments for shard, a in zip(plan.shards, annotations, strict=True) if shard.split == "train")
    rgb = RgbStatistics.of(sum(training, RgbMoments()))

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


def check_rejected(root: Location, plan: SetPlan, built: Collection[BuiltShard], max_bad_fraction: float) -> None:
    """Makes sure that the shards built so far leave out no more images than `max_bad_fraction` of the whole set.

    Raises:
        ShardSetError: if they do; `rejects.jsonl` lists them then. That of a finished set stays as it is.
    """
    count, images = sum(len(shard.annotation.rejected) for shard in built), plan.listing.images
    if count / images > max_bad_fraction:
        rejected = _rejects(built)
        if DATASET_FILE not in names_in(root):
            _write_rejects(root, plan, rejected)
        raise ShardSetError(
            f"{count} of {images} images are bad, more than --max-bad-fraction {max_bad_fraction} allows; "
            f"the first is {rejected[0].path}: {rejected[0].reason}. {shown(join(root, REJECTS_FILE))} lists those "
            "found so far: repair or remove them, or give a larger --max-bad-fraction, and run again"
        )


def _rejects(built: Iterable[BuiltShard]) -> list[Reject]:
    return sorted((r for shard in built for r in shard.annotation.rejected), key=lambda r: (r.split, r.path))


def _write_rejects(root: Location, plan: SetPlan, rejected: Iterable[Reject]) -> None:
    lines = "".join(json.dumps(reject.to_json()) + "\n" for reject in rejected)
    plan.claim.check(root)
    write(join(root, REJECTS_FILE), lines.encode())


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
