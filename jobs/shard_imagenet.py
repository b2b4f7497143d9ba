"""Turn images into a shard set that training reads: 256 x 256 JPEGs in WebDataset tars.

Each image's shorter side is resized to 256 and the central 256 x 256 square is kept. The set's order is a seeded
permutation, and its bytes depend on the images, the seed and the settings alone: a job that was stopped goes on when
the same command is run again. Shards are built by Ray, on this machine or on the cluster that RAY_ADDRESS names.

    python jobs/shard_imagenet.py --source IMAGES --output OUT

IMAGES holds a folder a class, or train/ and val/ that do; ImageNet's tars are read as they are:

    python jobs/shard_imagenet.py --source ILSVRC2012_img_train.tar --source-val ILSVRC2012_img_val.tar \
        --val-labels WNIDS.txt --output OUT

OUT/dataset.json is written last. A set of 256 x 256 WebDataset shards that was made elsewhere, SET/train/*.tar and
SET/val/*.tar, gets what training needs without a change to its tars:

    python jobs/shard_imagenet.py --annotate-only --output SET
"""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any, Literal

import ray
import ray.exceptions

from jobs.annotate import annotate_set
from jobs.cli import run
from jobs.cluster import connected, in_parallel
from jobs.progress import Progress
from pipeline.annotation import ShardAnnotation, ShardError
from pipeline.dataset import DatasetInfo
from pipeline.repair import rebuild
from pipeline.resize import encoder_settings
from pipeline.shard_set import REJECTS_FILE, SetPlan, claim_folder, find_finished, finish
from pipeline.shards import SourceReadError, build_shard, plan_shards
from pipeline.sources import read_source

MAX_SAMPLES_PER_SHARD = 20_000  # A worker holds its shard in memory, at about 25 KB an image.
TASK_RETRIES = 3


@dataclasses.dataclass(frozen=True)
class ShardConfig:
    """The command line of this job."""

    output: Path
    """Folder for the shard set: a new or empty one, or one where the same set was begun. On a cluster, on a disk that
    all nodes share."""
    source: Path | None = None
    """Folder with one folder of images a class; or ILSVRC2012_img_train.tar (a tar of class tars); or a folder of
    WebDataset shards (.jpg and .cls); or a folder that holds one of these as train/ (and val/), or ImageNet's tars."""
    source_val: Path | None = None
    """What to validate on, in any of these forms, instead of SOURCE/val; with --val-labels also a folder or a tar of
    images without classes, as ILSVRC2012_img_val.tar is."""
    val_labels: Path | None = None
    """Text file with the class of each validation image: a wnid a line, or one of the devkit's ids, in the order of the
    images' names."""
    val_synsets: Path | None = None
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
    only: tuple[str, ...] = ()
    """Build just these shards of a set again, as train-000123, which must be the same set: see verify_shards.py."""
    val_fraction: float = 0.1
    """Part of each class to validate on where there is no validation folder."""
    annotate_only: bool = False
    """Instead of sharding a source, add index, annotations and dataset.json to the tars in OUTPUT/train and OUTPUT/val,
    which another program made of 256 x 256 .jpg and .cls."""
    classes: Path | None = None
    """With --annotate-only, text file with 'wnid' or 'wnid name' a line in the order of the labels; by default the
    samples' keys and .json tell, or numbers are used."""

    def __post_init__(self) -> None:
        if self.annotate_only:
            self._check_annotate_only()
        elif self.source is None:
            raise ValueError("give --source IMAGES, or --annotate-only for a set whose tars were made elsewhere")
        elif self.classes is not None:
            raise ValueError("--classes is for --annotate-only: a source names its classes itself")
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

    def _check_annotate_only(self) -> None:
        for field in dataclasses.fields(self):
            taken = field.name in ("output", "workers", "annotate_only", "classes")
            if not taken and getattr(self, field.name) != field.default:
                flag = f"--{field.name.replace('_', '-')}"
                raise ValueError(f"--annotate-only changes no image, so leave out {flag}")


def main(config: ShardConfig) -> None:
    """Makes the set and prints what it holds.

    Raises:
        SourceError, ShardSetError, ShardError, DatasetError, OSError: with one line for the user.
    """
    output = Path(os.path.abspath(config.output))
    if config.source is None:
        _print_summary(output, annotate_set(output, config.classes, config.workers), rate=None)
        return
    listing = read_source(
        config.source, config.source_val, config.val_fraction, config.seed, config.val_labels, config.val_synsets
    )
    counts = ", ".join(f"{len(entries):,} {split}" for split, entries in listing.splits.items())
    print(f"{' and '.join(listing.roots)}: {counts} images of {len(listing.classes):,} classes", flush=True)
    if listing.ignored:
        print(f"files ignored, since their extensions are not those of images: {listing.ignored:,}", flush=True)
    shards = plan_shards(listing, config.seed, config.samples_per_shard)
    plan = SetPlan(listing, encoder_settings(config.quality), config.seed, config.samples_per_shard, tuple(shards))
    if config.only:
        for name in config.only:
            annotation = rebuild(output, plan, name, config.on_bad_image == "set-aside")
            print(f"{name} was built again: {annotation.samples:,} images, {annotation.bytes:,} bytes", flush=True)
        return
    info = find_finished(output, plan)
    if info is not None:
        print("This set was finished before; nothing to do.")
        _print_summary(output, info, rate=None)
        return
    claim_folder(output, plan)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    with connected(config.workers, **quiet), Progress(listing.images, "images") as progress:
        annotations = _build_all(output, plan, config, progress)
        rate = progress.rate
    _print_summary(output, finish(output, plan, annotations, config.max_bad_fraction), rate)


def _build_all(output: Path, plan: SetPlan, config: ShardConfig, progress: Progress) -> list[ShardAnnotation]:
    """Builds each shard as one task, no more at a time than there are workers; annotations in the plan's order."""
    # A worker that dies is retried as well; what a user must mend is not.
    task = ray.remote(build_shard).options(
        num_cpus=1, max_retries=TASK_RETRIES, retry_exceptions=[SourceReadError], name="build_shard"
    )
    done: dict[int, ShardAnnotation] = {}
    rejected = 0
    calls = ((output, shard, plan.image, config.on_bad_image == "set-aside") for shard in plan.shards)
    for number, reference in in_parallel(task, calls, config.workers):
        built = _get(reference, output)
        done[number] = built.annotation
        rejected += len(built.annotation.rejected)
        count = len(plan.shards[number].entries)
        progress.advance(count, worked=not built.kept, note=f"{rejected:,} set aside")
    return [done[number] for number in range(len(plan.shards))]


def _get(reference: ray.ObjectRef, output: Path) -> Any:
    """A task's result.

    Raises:
        ValueError, SourceReadError: the task's own error, without Ray's wrapping.
        ShardError: if the shard could not be written, or Ray gave the task up.
    """
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, OSError) and not isinstance(error.cause, SourceReadError):
            raise ShardError(
                f"a shard could not be written to {output}: {error.cause}; make room or give leave to write there, "
                "and run the same command again to continue"
            ) from error
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise ShardError(
            f"Ray gave a shard up after {TASK_RETRIES} retries ({type(error).__name__}): look for what ended the "
            "worker, as a lack of memory would, give fewer --workers, and run the same command again to continue"
        ) from error


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
