"""What `shard_imagenet.py --annotate-only` does: the tars of a set made elsewhere annotated by Ray, one a task."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import ray
import ray.exceptions

from jobs.cluster import connected, in_parallel
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

TASK_RETRIES = 3


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
    with JobLock(root, _say):
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
    task = ray.remote(annotate_shard).options(
        num_cpus=1, max_retries=TASK_RETRIES, retry_exceptions=[OSError], name="annotate_shard"
    )
    done: dict[int, AnnotatedShard] = {}
    wrong = 0
    for number, reference in in_parallel(task, ((root, *shard, classes) for shard in shards), workers):
        try:
            done[number] = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            raise ShardError(
                f"Ray gave a shard up after {TASK_RETRIES} retries ({type(error).__name__}): look for what ended the "
                "worker, as a lack of memory would, give fewer --workers, and run the same command again to continue"
            ) from error
        wrong += bool(done[number].faults)
        progress.advance(1, worked=not done[number].kept, note=f"{wrong:,} with faults")
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


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
