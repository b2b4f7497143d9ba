"""One shard of a set built again, without touching the others: the cure for what `verify_shards.py` finds."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

from pipeline.annotation import ShardAnnotation
from pipeline.dataset import DATASET_FILE, TEMPORARY_SUFFIX, DatasetInfo, ShardRow, write_json
from pipeline.shard_set import UNFINISHED_FILE, SetPlan, ShardSetError, check_begun, compare_finished
from pipeline.shards import ShardPlan, annotation_path, build_shard


def rebuild(root: Path, plan: SetPlan, name: str, set_aside: bool) -> ShardAnnotation:
    """Builds one shard of the set in ROOT again, whatever is there of it.

    In a finished set it must come out as `dataset.json` says, and only then replaces what is there.

    Args:
        plan: of the whole set.
        set_aside: whether a bad image may be left out; see `build_shard`.

    Raises:
        ShardSetError: if ROOT holds no set or another one, the set has no such shard, or the shard comes out otherwise.
        DatasetError, ShardError, OSError: as in `compare_finished` and `build_shard`.
    """
    shard = next((shard for shard in plan.shards if shard.name == name), None)
    if shard is None:
        splits = {shard.split: shard.name for shard in plan.shards}
        raise ShardSetError(f"--only {name} is no shard of this set: its last ones are {', '.join(splits.values())}")
    if (root / DATASET_FILE).exists():
        info, _ = compare_finished(root, plan, but=name)
        return _replace(root, info, plan, shard, set_aside)
    if not (root / UNFINISHED_FILE).exists():
        raise ShardSetError(f"{root} holds no shard set to mend: leave out --only to make it")
    check_begun(root, plan)
    annotation_path(root, shard).unlink(missing_ok=True)
    return build_shard(root, shard, plan.image, set_aside).annotation


def _replace(root: Path, info: DatasetInfo, plan: SetPlan, shard: ShardPlan, set_aside: bool) -> ShardAnnotation:
    row = next((row for row in info.splits[shard.split].shards if row.name == shard.name), None)
    aside = root / f".{shard.name}{TEMPORARY_SUFFIX}"
    # What a killed run left is of no use: a shard is built in seconds.
    shutil.rmtree(aside, ignore_errors=True)
    try:
        annotation = build_shard(aside, shard, plan.image, set_aside).annotation
        if _row(annotation) != row:
            raise ShardSetError(
                f"{shard.name} comes out otherwise than {root / DATASET_FILE} says, though the source's names and "
                "sizes are the same: an image in it has changed; bring the old one back, or make the set anew in "
                "another --output"
            )
        annotation = dataclasses.replace(annotation, rgb=info.rgb)
        write_json(annotation_path(aside, shard), annotation.to_json())
        (root / shard.split).mkdir(exist_ok=True)
        for path in sorted((aside / shard.split).iterdir(), key=lambda path: path.suffix == ".json"):
            os.replace(path, root / shard.split / path.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return annotation


def _row(annotation: ShardAnnotation) -> ShardRow | None:
    """The line of `dataset.json` about a shard; None for one without images, which has none."""
    if not annotation.samples:
        return None
    return ShardRow(annotation.name, annotation.samples, annotation.bytes, annotation.sha256)
