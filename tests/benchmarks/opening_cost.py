"""What opening a split costs one rank: time, and memory above what the process had before.

    python -m tests.benchmarks.opening_cost --work FOLDER --shards 1251

Makes a set of such shards, its images so many bytes that are no JPEGs, as opening decodes none, and opens it in a fresh
process each time: from the page cache, and from the disk, after the set was dropped from the cache. Memory is what the
kernel says of the process: its largest resident size while the set is opened, and what it has afterwards.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import gc
import hashlib
import multiprocessing
import os
import platform
import shutil
import statistics
import time
import zlib
from pathlib import Path

import numpy as np

from jobs.cli import run
from pipeline.annotation import ShardAnnotation
from pipeline.dataset import DATASET_FILE, ClassLabel, DatasetInfo, ShardRow, Split, read_dataset, write_json
from pipeline.resize import encoder_settings
from pipeline.rgb_stats import RgbMoments, RgbStatistics
from pipeline.shards import pack
from pipeline.split_reader import SplitReader
from tests.benchmarks.plan_cost import high_water_mb
from tests.benchmarks.source_memory import resident_mb

CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class OpeningCostConfig:
    work: Path
    """A folder for the set, which is removed at the end."""
    shards: int = 125
    """Of the training split; ImageNet's has 1,251."""
    samples_per_shard: int = 1024
    image_bytes: int = 700
    """Of each image. On a disk, as few lie closer together than real images, of about 21,000."""
    rounds: int = 3
    """Each figure is the median of so many fresh processes."""
    json: Path | None = None
    """Also write the figures to this file."""

    def __post_init__(self) -> None:
        for field in ("shards", "samples_per_shard", "image_bytes", "rounds"):
            if getattr(self, field) < 1:
                raise ValueError(f"--{field.replace('_', '-')} is {getattr(self, field)}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class OpeningCost:
    """Of one opening."""

    seconds: float
    cpu_seconds: float
    peak_mb: float
    """Growth of the process's largest resident size."""
    kept_mb: float
    """Growth of its resident size, the set open."""


def make_set(root: Path, config: OpeningCostConfig) -> None:
    """A set as this program makes it, but for its images."""
    (root / "train").mkdir(parents=True)
    moments = RgbMoments(1, (1, 1, 1), (1, 1, 1, 1, 1, 1))
    classes = tuple(ClassLabel(i, f"n{i:08d}", f"class {i}") for i in range(CLASSES))
    random = np.random.default_rng(0)
    rows = []
    for number in range(config.shards):
        labels = random.integers(CLASSES, size=config.samples_per_shard).tolist()
        jpegs = [random.bytes(config.image_bytes) for _ in labels]
        keys = [f"n{label:08d}_{number}_{i}" for i, label in enumerate(labels)]
        tar, index = pack(list(zip(keys, labels, jpegs, strict=True)))
        name, digest = f"train-{number:06d}", hashlib.sha256(tar).hexdigest()
        path = root / "train" / f"{name}.tar"
        path.write_bytes(tar)
        path.with_suffix(".idx").write_text(index)
        checksums = tuple(zlib.crc32(jpeg) for jpeg in jpegs)
        annotation = ShardAnnotation(name, len(labels), len(tar), digest, digest, moments, (), checksums)
        write_json(path.with_suffix(".json"), annotation.to_json())
        rows.append(ShardRow(name, len(labels), len(tar), digest))
    train = Split(sum(row.samples for row in rows), sum(row.bytes for row in rows), tuple(rows))
    image = encoder_settings(90)
    write_json(
        root / DATASET_FILE,
        DatasetInfo(classes, {"train": train}, image, 0, RgbStatistics.of(moments), "", 0).to_json(),
    )


def opening(root: Path, cold: bool) -> OpeningCost:
    """Opens the set in this process, which must not have opened one before."""
    info = read_dataset(root)
    if cold:
        for path in (root / "train").iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)  # What is not yet on the disk is not dropped.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    gc.collect()
    peak, size = high_water_mb(), resident_mb()
    started, worked = time.perf_counter(), time.process_time()
    reader = SplitReader(root, info, "train")
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - worked
    gc.collect()
    assert len(reader) == info.splits["train"].samples
    return OpeningCost(seconds, cpu_seconds, high_water_mb() - peak, resident_mb() - size)


def measure(root: Path, config: OpeningCostConfig) -> dict[str, list[OpeningCost]]:
    """Each round of opening from the page cache and from the disk."""
    found: dict[str, list[OpeningCost]] = {"cached": [], "cold": []}
    for way, costs in found.items():
        for _ in range(config.rounds + (way == "cached")):
            context = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(1, context) as process:
                costs.append(process.submit(opening, root, way == "cold").result())
    # The first filled the cache.
    del found["cached"][0]
    return found


def main(config: OpeningCostConfig) -> None:
    root = config.work / "opening-cost"
    try:
        make_set(root, config)
        found = measure(root, config)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    samples = config.shards * config.samples_per_shard
    print(
        f"{platform.processor() or platform.machine()}, numpy {np.__version__}: {config.shards:,} shards of "
        f"{config.samples_per_shard:,} images of {config.image_bytes:,} bytes; medians of {config.rounds}:"
    )
    for way, costs in found.items():
        columns = zip(*map(dataclasses.astuple, costs), strict=True)
        seconds, cpu, peak, kept = (statistics.median(values) for values in columns)
        print(
            f"  {way:7s} {seconds:7.2f} s ({1e6 * seconds / samples:5.2f} a million images), CPU {cpu:6.2f} s; "
            f"peak {peak:6.1f} MB, kept {kept:6.1f} MB ({1e6 * kept / samples:5.1f} a million)"
        )
    if config.json is not None:
        write_json(config.json, {way: [dataclasses.asdict(cost) for cost in costs] for way, costs in found.items()})


if __name__ == "__main__":
    run(OpeningCostConfig, main)
