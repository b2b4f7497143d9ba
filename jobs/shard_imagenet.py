r"""Turn images into a shard set that training reads: 256 x 256 JPEGs in WebDataset tars.

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

OUT may be a URL, too, as s3://BUCKET/SET: each worker writes its shards there, and no disk is shared or needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.cli.command import log, run
from pipeline.storage.locations import check_writable, is_url, join, shown

MAX_SAMPLES_PER_SHARD = 20_000  # A worker holds its shard in memory: 20.7 KB an image, in 3,000 of ImageNet's.


@dataclasses.dataclass(frozen=True)
class ShardConfig:
    """The command line of this job."""

    output: str
    """Folder for the shard set: a new or empty one, or one where the same set was begun. A URL (s3://, gs://) or a
    path, on a cluster on a disk that all nodes share."""
    source: str
    """Folder with one folder of images a class; or ILSVRC2012_img_train.tar (a tar of class tars); or a folder of class
    tars; or a folder of WebDataset shards (.jpg and .cls), or of tars with a wnid in each image's name, as Hugging
    Face's; or a folder or tar that holds one of these as train/ (and val/), or ImageNet's tars. A local path or a URL
    (s3://, gs://, and http:// for tars); {000..146} in it stands for many tars.
    """
    source_val: str | None = None
    """What to validate on, in any of these forms, instead of SOURCE/val; with --val-labels also a folder or a tar of
    images without classes, as ILSVRC2012_img_val.tar is."""
    val_labels: str | None = None
    """Text file with the class of each validation image: a wnid a line, or one of the devkit's ids, in the order of the
    images' names; or 'name class' rows, as in Kaggle's LOC_val_solution.csv and Caffe's val.txt."""
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
    max_bad_fraction: float = 0.001
    """An image that does not decode is left out and listed in rejects.jsonl. Stop once these are more than this part of
    all images; 0 allows none."""
    val_fraction: float = 0.1
    """Part of each class to validate on where there is no validation folder."""

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
        check_writable("--output", self.output)


if __name__ == "__main__":
    run(ShardConfig, "jobs.shard_imagenet")  # Before the imports below, which take seconds.

import pyarrow as pa

from jobs.cli.progress import Progress
from jobs.cluster.build import build_all
from jobs.cluster.connection import connected
from jobs.cluster.paths import with_whole_paths
from pipeline.dataset.info import REJECTS_FILE, DatasetInfo
from pipeline.dataset.sample_index import SCHEMA
from pipeline.images.equal_images import equal_images
from pipeline.images.resize import encoder_settings
from pipeline.sharding.claim import ShardSetError
from pipeline.sharding.set_folder import check_folder, claim_folder, is_left_over, make_folder, with_encoder_of
from pipeline.sharding.set_lock import JobLock
from pipeline.sharding.shard_plan import SetPlan, plan_shards
from pipeline.sharding.shard_set import find_finished, finish, tidy
from pipeline.sharding.shards import BuiltShard
from pipeline.sources.sources import check_output, read_source
from pipeline.sources.stored_listing import ListingStore


def main(config: ShardConfig) -> None:
    """Makes the set, or what is missing of it, and prints what it holds.

    Raises:
        SourceError, ShardSetError, ShardError, DatasetError, OSError: with one line for the user.
    """
    config = with_whole_paths(config, "output", "source", "source_val")
    output = join(config.output)
    check_output(output, config.source, config.source_val)
    check_folder(output)
    listing = read_source(
        config.source,
        config.source_val,
        config.val_fraction,
        config.seed,
        config.val_labels,
        config.val_synsets,
        ListingStore(output, log),
    )
    counts = ", ".join(f"{len(entries):,} {split}" for split, entries in listing.splits.items())
    print(f"{' and '.join(listing.roots)}: {counts} images of {len(listing.classes):,} classes", flush=True)
    for note in listing.notes:
        print(note, flush=True)
    shards = plan_shards(listing, config.seed, config.samples_per_shard)
    plan = SetPlan(listing, encoder_settings(config.quality), config.seed, config.samples_per_shard, tuple(shards))
    plan = with_encoder_of(output, plan)
    info, rate = find_finished(output, plan), None
    if info is None or is_left_over(output):
        make_folder(output)
        # A store has no locks: see `pipeline.sharding.claim`.
        with contextlib.nullcontext() if is_url(output) else JobLock(Path(output), log) as lock:
            # Meanwhile another job may have finished one here.
            info = info or find_finished(output, plan)
            if info is None:
                info, rate = _make(output, plan, config, lock)
            else:
                tidy(output, info, log)
    if rate is None:
        check_set_aside(output, info, plan.listing.images, config.max_bad_fraction)
        print("This set was finished before; nothing to do.")
    _print_summary(output, info, rate)


def _make(output: str, plan: SetPlan, config: ShardConfig, lock: JobLock | None) -> tuple[DatasetInfo, float]:
    """Makes the set, and says how many images a second were converted."""
    claim_folder(output, plan)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    with connected(config.workers, **quiet), Progress(plan.listing.images, "images") as progress:
        built = build_all(output, plan, config.max_bad_fraction, config.workers, progress)
        rate = progress.rate
    if lock is not None:
        lock.shut_out_workers()
    print_equal_images(built)
    return finish(output, plan, built, log), rate


def check_set_aside(output: str, info: DatasetInfo, images: int, max_bad_fraction: float) -> None:
    """Raises ShardSetError if a finished set left out more images than this command line allows."""
    if info.set_aside / images > max_bad_fraction:
        raise ShardSetError(
            f"{shown(output)} is finished, with {info.set_aside} of {images} images set aside, more than "
            f"--max-bad-fraction {max_bad_fraction} allows; {shown(join(output, REJECTS_FILE))} lists them: "
            "repair or remove them and give another --output, or allow as many"
        )


def print_equal_images(built: Sequence[BuiltShard]) -> None:
    """Says how many stored images are stored under another class, too."""
    rows = pa.Table.from_batches([shard.rows for shard in built if len(shard.rows)], SCHEMA)
    found = equal_images(*(rows[column].to_numpy() for column in ("size", "crc32", "label")))
    if found.images:
        print(
            f"images that are stored under another class, too, byte for byte: {found.images:,}; one of them "
            f"{found.most:,} times under {found.classes:,} classes, as {rows['key'][found.example]}: is it what a "
            "download puts in place of a missing image?",
            flush=True,
        )


def _print_summary(output: str, info: DatasetInfo, rate: float | None) -> None:
    print(f"The shard set is in {shown(output)}")
    for name, split in info.splits.items():
        print(f"  {name}: {split.samples:,} images, {len(split.shards):,} shard(s), {split.bytes:,} bytes")
    aside = f", listed in {shown(join(output, REJECTS_FILE))}" if info.set_aside else ""
    print(f"  images set aside: {info.set_aside:,}{aside}")
    if rate:
        print(f"  speed: {rate:,.1f} images/s")
    values = ", ".join(f"{value:.6f}" for value in info.rgb.eigenvalues)
    print(f"  RGB PCA eigenvalues, RGB scaled to [0, 1]: {values}")
