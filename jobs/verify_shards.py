"""Check a finished shard set: every shard against dataset.json, its index, its annotation and, if asked, its pixels.

    python jobs/verify_shards.py --data OUT

Prints a line for each split that is right, or for each fault with the shard and image that it is in, and the command
that builds a damaged shard again.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
from collections.abc import Mapping
from shlex import quote

from jobs.cli.command import run

AGAIN = "run the command that made the set"  # Of a fault of the whole set that names its cure.
FAULTS_SHOWN = 20  # Of one shard: a cut one may have thousands.


class VerifyError(ValueError):
    """A set that has faults, or that could not be checked to its end."""


@dataclasses.dataclass(frozen=True)
class VerifyConfig:
    """The command line of this job."""

    data: str
    """The shard set: a folder, on a cluster on a disk that all nodes share, or a URL (s3://, gs://)."""
    decode: bool = False
    """Decode every image, too: it must be 256 x 256 RGB, and its pixels must be those that the annotation counted."""
    workers: int | None = None
    """How many shards are checked at a time; by default one a CPU."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers {self.workers} must be at least 1")


if __name__ == "__main__":
    run(VerifyConfig, "jobs.verify_shards")  # Before the imports below, which take seconds.

import numpy as np
import ray

from jobs.cli.progress import Progress
from jobs.cluster.connection import RETRIES, LostError, connected, in_parallel
from pipeline.dataset.info import DATASET_FILE, DatasetInfo, read_dataset, rebuild_advice, staged_from
from pipeline.dataset.sample_index import SampleIndex
from pipeline.dataset.verify import Fault, ShardReport, check_set, check_shard, open_indexes
from pipeline.storage.locations import join, shown


def main(config: VerifyConfig) -> None:
    """Checks the set and prints what it found.

    Raises:
        VerifyError: if anything is wrong, after the faults were printed.
        DatasetError, OSError: if there is no finished set, or it cannot be read.
    """
    root = join(config.data)
    info = read_dataset(root)
    if origin := staged_from(root):
        raise VerifyError(
            f"{shown(root)} is a copy for training, staged from {origin}: check that one; a copy checks itself"
        )
    samples = sum(row.samples for part in info.splits.values() for row in part.shards)
    indexes, index_faults = open_indexes(root, info)
    with (
        connected(config.workers, logging_level=logging.ERROR, log_to_driver=False),
        Progress(samples, "images") as progress,
    ):
        reports = _check_all(root, info, indexes, config, progress)
    whole = [*index_faults, *check_set(root, info, indexes, reports)]
    by_shard: dict[str, list[Fault]] = collections.defaultdict(list)
    for fault in [*(fault for report in reports for fault in report.faults), *whole]:
        by_shard[fault.shard].append(fault)
    for split, index in indexes.items():
        rows = info.splits[split].shards
        if not any(row.name in by_shard for row in rows):
            _print_right(split, index, len(rows), len(info.classes), config.decode)
    splits = {report.name: report.split for report in reports}
    for name, faults in by_shard.items():
        for fault in faults[:FAULTS_SHOWN]:
            print(f"FAULT {fault}")
        if len(faults) > FAULTS_SHOWN:
            print(f"FAULT {name}: and {len(faults) - FAULTS_SHOWN:,} more")
        if name:
            print(f"  {rebuild_advice(root, splits[name], name, _settings(info, reports))}")
        elif not any(AGAIN in fault.what for fault in faults):
            print(f"  if no shard is at fault, make the set anew in another folder: {DATASET_FILE} itself is damaged")
    if by_shard:
        count, shards = sum(map(len, by_shard.values())), len([name for name in by_shard if name])
        raise VerifyError(
            f"{shown(root)} has {count:,} fault(s), in {shards:,} of {len(reports):,} shard(s): see above"
        )


def _check_all(
    root: str, info: DatasetInfo, indexes: Mapping[str, SampleIndex], config: VerifyConfig, progress: Progress
) -> list[ShardReport]:
    """A report of each shard, in the set's order."""
    work = [(split, row) for split, part in info.splits.items() for row in part.shards]
    shared = ray.put(info)
    found = 0
    reports: dict[int, ShardReport] = {}
    calls = (
        (root, split, row, indexes[split].part(number) if split in indexes else None, shared, config.decode)
        for split, part in info.splits.items()
        for number, row in enumerate(part.shards)
    )
    try:
        for number, report in in_parallel(check_shard, calls, config.workers):
            reports[number] = report
            found += len(report.faults)
            progress.advance(work[number][1].samples, note=f"{found:,} faults")
    except LostError as error:
        raise VerifyError(
            f"Ray gave a shard up after {RETRIES} retries ({error.reason}): look for what ended the "
            "worker, as a lack of memory would, and give fewer --workers"
        ) from error
    return [reports[number] for number in range(len(work))]


def _print_right(split: str, index: SampleIndex, shards: int, classes: int, decode: bool) -> None:
    per_class = np.bincount(index.labels, minlength=classes).tolist()
    low, high = min(per_class), max(per_class)
    each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    print(
        f"OK {split}: {len(index):,} images in {shards:,} shard(s), {each} of each of {classes:,} classes"
        f"{', all decoded' if decode else ''}"
    )


def _settings(info: DatasetInfo, reports: list[ShardReport]) -> str:
    """The arguments that the set was made with, as far as they can be told and are not the defaults."""
    # Only the last shard of a split may be short; where there is no other, any number from its own on does.
    dealt = [report.annotation.samples + len(report.annotation.rejected) for report in reports if report.annotation]
    dealt += [row.samples for part in info.splits.values() for row in part.shards]
    least = 0 if len(reports) > len(info.splits) else 1250
    values = {
        "quality": (info.image.get("quality"), 90),
        "seed": (info.seed, 0),
        "samples-per-shard": (max([least, *dealt]) or 1250, 1250),
    }
    return "".join(
        f"--{name} {quote(str(value))} " for name, (value, default) in values.items() if value not in (default, None)
    )
