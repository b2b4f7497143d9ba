"""What `shard_imagenet.py --annotate-only` does: the tars of a set made elsewhere annotated by Ray, one a task."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from jobs.cli import say
from jobs.cluster import RETRIES, LostError, connected, in_parallel
from jobs.progress import Progress
from pipeline.annotate import AnnotatedShard, annotate_shard
from pipeline.annotated_set import (
    begin,
    check_first_images,
    describe,
    find_shards,
    finish_annotated,
    reshard_advice,
)
from pipeline.annotation import ShardError
from pipeline.dataset import DatasetInfo
from pipeline.label_names import LabelNames, read_label_names
from pipeline.set_lock import JobLock
from pipeline.shard_samples import Fault
from pipeline.shard_set import ShardSetError


def annotate_set(root: Path, classes: Path | None, workers: int | None) -> DatasetInfo:
    """Annotates the set in ROOT, prints what is wrong with it or what its classes are called, and finishes it.

    Args:
        classes: text file with 'wnid name' a line, in the order of the labels; None to go by the samples.

    Raises:
        ShardSetError: if it cannot be annotated as it is; nothing of its tars was changed.
        ShardError: if Ray gave a shard up.
        SourceError, OSError: if `classes` or a file of the set cannot be used.
    """
    given = None if classes is None else read_label_names(classes)
    shards = find_shards(root)
    with JobLock(root, say):
        return _annotate(root, shards, given, workers)


def _annotate(
    root: Path, shards: Sequence[tuple[str, str]], given: LabelNames | None, workers: int | None
) -> DatasetInfo:
    check_first_images(root, shards)
    begin(root, shards)
    with (
        connected(workers, logging_level=logging.ERROR, log_to_driver=False),
        Progress(len(shards), "shards") as progress,
    ):
        done = _annotate_all(root, shards, None if given is None else len(given.wnids), workers, progress)
    _refuse(root, [fault for shard in done for fault in shard.faults])
    info, names, faults = describe(root, done, given)
    _refuse(root, faults)
    print(f"class names: {names.reason}; label 0 is {names.wnids[0]} ({names.names[0]})")
    if not finish_annotated(root, done, info):
        print("This set was annotated before; nothing to do.")
    return info


def _annotate_all(
    root: Path, shards: Sequence[tuple[str, str]], classes: int | None, workers: int | None, progress: Progress
) -> list[AnnotatedShard]:
    """Each shard's outcome, in the set's order."""
    done: dict[int, AnnotatedShard] = {}
    wrong = 0
    try:
        for number, shard in in_parallel(annotate_shard, ((root, *shard, classes) for shard in shards), workers):
            done[number] = shard
            wrong += bool(shard.faults)
            progress.advance(1, worked=not shard.kept, note=f"{wrong:,} with faults")
    except LostError as error:
        raise ShardError(
            f"Ray gave a shard up after {RETRIES} retries ({error.reason}): look for what ended the "
            "worker, as a lack of memory would, give fewer --workers, and run the same command again to continue"
        ) from error
    return [done[number] for number in range(len(shards))]


def _refuse(root: Path, faults: Sequence[Fault]) -> None:
    if not faults:
        return
    for fault in faults:
        print(f"FAULT {fault}")
    count = len({fault.shard for fault in faults})
    raise ShardSetError(
        f"{root} has {len(faults):,} faults in {count:,} shards, see above: mend them, or {reshard_advice(root)}"
    )
