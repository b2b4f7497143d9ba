"""Turn images into a shard set that training reads: 256 x 256 JPEGs in WebDataset tars.

Each image's shorter side is resized to 256 and the central 256 x 256 square is kept. The set's order is a seeded
permutation, and its bytes depend on the images, the seed and the settings alone: a job that was stopped goes on when
the same command is run again. Shards are built by Ray, on this machine or on the cluster that RAY_ADDRESS names.

    python jobs/shard_imagenet.py --source IMAGES --output OUT

IMAGES holds a folder a class, or train/ and val/ that do; ImageNet's tars are read as they are:

    python jobs/shard_imagenet.py --source ILSVRC2012_img_train.tar --source-val ILSVRC2012_img_val.tar \
        --val-labels WNIDS.txt --output OUT

Any of them may be a URL, as s3://BUCKET/ILSVRC2012_img_train.tar or http://HOST/imagenet-train-{000000..000146}.tar.

OUT/dataset.json is written last. An image that already is a 256 x 256 baseline JPEG is stored byte for byte, so that a
set made elsewhere is taken over without loss: --source SET.

With --copy-to s3://BUCKET/SET a finished set is copied there and read back, for `jobs/train.py --data s3://BUCKET/SET`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any, Literal

from jobs.cli.command import log, run
from jobs.cli.progress import Progress
from jobs.cluster.build import build_all
from jobs.cluster.connection import connected
from pipeline.dataset.info import REJECTS_FILE, DatasetInfo
from pipeline.images.resize import encoder_settings
from pipeline.sharding.set_lock import JobLock
from pipeline.sharding.shard_set import (
    SetPlan,
    claim_folder,
    find_finished,
    finish,
    is_left_over,
    make_folder,
    tidy,
    with_encoder_of,
)
from pipeline.sharding.shards import plan_shards
from pipeline.sources.sources import read_source
from pipeline.staging.publish import check_destination, check_unwritable, publish
from pipeline.storage.locations import shown

MAX_SAMPLES_PER_SHARD = 20_000  # A worker holds its shard in memory: 20.7 KB an image, in 3,000 of ImageNet's.


@dataclasses.dataclass(frozen=True)
class ShardConfig:
    """The command line of this job."""

    output: Path
    """Folder for the shard set: a new or empty one, or one where the same set was begun. On a cluster, on a disk that
    all nodes share."""
    source: str
    """Folder with one folder of images a class; or ILSVRC2012_img_train.tar (a tar of class tars); or a folder of class
    tars; or a folder of WebDataset shards (.jpg and .cls); or a folder that holds one of these as train/ (and val/), or
    ImageNet's tars. A local path or a URL (s3://, gs://, and http:// for tars); {000..146} in it stands for many tars.
    """
    source_val: str | None = None
    """What to validate on, in any of these forms, instead of SOURCE/val; with --val-labels also a folder or a tar of
    images without classes, as ILSVRC2012_img_val.tar is."""
    val_labels: str | None = None
    """Text file with the class of each validation image: a wnid a line, or one of the devkit's ids, in the order of the
    images' names."""
    val_synsets: str | None = None
    """Text file with 'id wnid' a line, which --val-labels with the devkit's ids needs."""
    workers: int | None = None
    """How many shards are built at a time; by default one a CPU."""
    quality: int = 90
    """JPEG quality of the stored images, 1 to 95."""
    seed: int = 0
    """Decides the order of the images, and which ones validate where there is no validation folder."""
    samples_per_shard: int = 1250
    """Images in one shard, 1 to 20,000."""
    on_bad_image: Literal["set-aside", "fail"] = "set-aside"
    """What to do with an image that does not decode: leave it out and list it in rejects.jsonl, or stop."""
    max_bad_fraction: float = 0.001
    """Fail if more than this part of all images was set aside."""
    val_fraction: float = 0.1
    """Part of each class to validate on where there is no validation folder."""
    copy_to: str | None = None
    """A URL (s3://, gs://) to copy the set to once it is finished, also if it was before: what is not
    there or is damaged is sent, and every file is read back. The same command goes on after a failure."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers {self.workers} must be at least 1")
        if not 1 <= self.quality <= 95:
            raise ValueError(f"--quality {self.quality} must lie between 1 and 95")
        if not 1 <= self.samples_per_shard <= MAX_SAMPLES_PER_SHARD:
            raise ValueError(
                f"--samples-per-shard {self.samples_per_shard} must lie between 1 and {MAX_SAMPLES_PER_SHARD}"
            )
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"--max-bad-fraction {self.max_bad_fraction} must lie between 0 and 1")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"--val-fraction {self.val_fraction} must lie between 0 and 1, both excluded")
        if self.copy_to is not None:
            check_unwritable(self.copy_to)


def main(config: ShardConfig) -> None:
    """Makes the set, prints what it holds, and copies it to where it is wanted.

    Raises:
        SourceError, ShardSetError, ShardError, DatasetError, StoreError, OSError: with one line for the user.
    """
    output = Path(os.path.abspath(config.output))
    if config.copy_to is not None:
        check_destination(config.copy_to)
    _make_or_mend(output, config)
    if config.copy_to is not None:
        published = publish(output, config.copy_to, log)
        if published.sent:
            print(
                f"The set is at {shown(config.copy_to)}, read back: {published.sent:,} of {published.files:,} files "
                f"were sent, {published.bytes_sent:,} bytes"
            )
        else:
            print(f"The set was at {shown(config.copy_to)} before, all {published.files:,} files right; nothing to do.")


def _make_or_mend(output: Path, config: ShardConfig) -> None:
    """Makes the set, or what is missing of it, and prints what came of it."""
    listing = read_source(
        config.source, config.source_val, config.val_fraction, config.seed, config.val_labels, config.val_synsets
    )
    counts = ", ".join(f"{len(entries):,} {split}" for split, entries in listing.splits.items())
    print(f"{' and '.join(listing.roots)}: {counts} images of {len(listing.classes):,} classes", flush=True)
    if listing.ignored:
        print(f"files ignored, since their extensions are not those of images: {listing.ignored:,}", flush=True)
    if listing.unread:
        print(f"folders beside train/ that are not read: {', '.join(listing.unread)}", flush=True)
    shards = plan_shards(listing, config.seed, config.samples_per_shard)
    plan = SetPlan(listing, encoder_settings(config.quality), config.seed, config.samples_per_shard, tuple(shards))
    plan = with_encoder_of(output, plan)
    info, rate = find_finished(output, plan), None
    if info is None or is_left_over(output):
        make_folder(output)
        with JobLock(output, log) as lock:
            if info is None:
                info, rate = _make(output, plan, config, lock)
            else:
                tidy(output, info, log)
    if rate is None:
        print("This set was finished before; nothing to do.")
    _print_summary(output, info, rate)


def _make(output: Path, plan: SetPlan, config: ShardConfig, lock: JobLock) -> tuple[DatasetInfo, float]:
    """Makes the set, and says how many images a second were converted."""
    claim_folder(output, plan)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    with connected(config.workers, **quiet), Progress(plan.listing.images, "images") as progress:
        built = build_all(output, plan, config.on_bad_image == "set-aside", config.workers, progress)
        rate = progress.rate
    lock.shut_out_workers()
    return finish(output, plan, built, config.max_bad_fraction, log), rate


def _print_summary(output: Path, info: DatasetInfo, rate: float | None) -> None:
    print(f"The shard set is in {output}")
    for name, split in info.splits.items():
        print(f"  {name}: {split.samples:,} images, {len(split.shards):,} shards, {split.bytes:,} bytes")
    aside = f", listed in {output / REJECTS_FILE}" if info.set_aside else ""
    print(f"  images set aside: {info.set_aside:,}{aside}")
    if rate:
        print(f"  speed: {rate:,.1f} images/s")
    values = ", ".join(f"{value:.6f}" for value in info.rgb.eigenvalues)
    print(f"  RGB PCA eigenvalues, RGB scaled to [0, 1]: {values}")


if __name__ == "__main__":
    run(ShardConfig, main)
