"""What opening a split costs one rank: time, and private memory above what the process had before.

    python -m tests.benchmarks.opening_cost --work FOLDER

Writes a sample index and empty tars of the right sizes for sets as large as ImageNet and ImageNet-21k, and opens each
in a fresh process: `dataset.json` parsed, the index mapped and its labels checked, every tar opened. From the page
cache, and from the disk, after the files were dropped from the cache. Private memory is the kernel's count of anonymous
pages: the mapped index is shared by all ranks of a node.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import gc
import multiprocessing
import os
import re
import shutil
import statistics
import time
from pathlib import Path

import numpy as np

from jobs.cli.command import run
from jobs.cli.device import processor
from pipeline.dataset.info import (
    DATASET_FILE,
    ClassLabel,
    DatasetInfo,
    ShardRow,
    Split,
    read_dataset,
    write_json,
)
from pipeline.dataset.sample_index import describe_index, pack_index, record_batch
from pipeline.dataset.split_reader import SplitReader
from pipeline.images.resize import encoder_settings
from pipeline.images.rgb_stats import RgbMoments, RgbStatistics
from pipeline.storage.remote import write_atomically
from tests.benchmarks.contest import check_least

PER_SHARD = 1250
IMAGE_BYTES = 21_000


@dataclasses.dataclass(frozen=True)
class OpeningCostConfig:
    work: Path
    """A folder for the sets, which are removed at the end."""
    images: tuple[int, ...] = (1_281_167, 14_197_122)
    """Of the training split: ImageNet's and ImageNet-21k's."""
    classes: int = 1000
    rounds: int = 5
    """Each figure is the median of so many fresh processes."""
    json: Path | None = None
    """Also write the figures to this file."""

    def __post_init__(self) -> None:
        check_least(self, "images", "classes", "rounds")


@dataclasses.dataclass(frozen=True)
class OpeningCost:
    """Of one opening."""

    dataset_s: float
    """Parsing `dataset.json`."""
    split_s: float
    """Opening the split."""
    private_mb: float
    """Growth of the process's anonymous memory by both."""


def make_set(root: Path, images: int, classes: int) -> None:
    """A set as this program makes it, but that its tars are holes."""
    (root / "train").mkdir(parents=True)
    random = np.random.default_rng(0)
    rows, shards = [], []
    for number, start in enumerate(range(0, images, PER_SHARD)):
        count = min(PER_SHARD, images - start)
        keys = [f"n{start + i:08d}_{i:08d}" for i in range(count)]
        labels, offsets = random.integers(classes, size=count), 1536 + np.arange(count) * (IMAGE_BYTES + 1536)
        rows.append(record_batch(keys, np.zeros(count), offsets, np.full(count, IMAGE_BYTES), labels, labels))
        shards.append(ShardRow(f"train-{number:06d}", count, int(offsets[-1]) + IMAGE_BYTES, "0" * 64))
        path = root / "train" / f"train-{number:06d}.tar"
        path.touch()
        os.truncate(path, shards[-1].bytes)
    index = pack_index(rows)
    write_atomically(root / "train.arrow", index)
    split = describe_index(Split(images, sum(shard.bytes for shard in shards), tuple(shards)), index)
    names = tuple(ClassLabel(i, f"n{i:08d}", f"class {i}") for i in range(classes))
    rgb = RgbStatistics.of(RgbMoments(1, (1, 1, 1), (1, 1, 1, 1, 1, 1)))
    info = DatasetInfo(names, {"train": split}, encoder_settings(90), 0, rgb, "", 0)
    write_json(root / DATASET_FILE, info.to_json())


def anonymous_mb() -> float:
    """This process's anonymous memory, as the kernel counts it."""
    found = re.search(r"^Anonymous:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1000


def opening(root: Path, cold: bool) -> OpeningCost:
    """Opens the set in this process, which must not have opened one before."""
    if cold:
        for path in (root / DATASET_FILE, root / "train.arrow"):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)  # What is not yet on the disk is not dropped.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    gc.collect()
    before = anonymous_mb()
    started = time.perf_counter()
    info = read_dataset(root)
    parsed = time.perf_counter()
    reader = SplitReader(root, info, "train")
    opened = time.perf_counter()
    gc.collect()
    assert len(reader) == info.splits["train"].samples
    return OpeningCost(parsed - started, opened - parsed, anonymous_mb() - before)


def measure(root: Path, rounds: int) -> dict[str, OpeningCost]:
    """Medians of opening from the page cache and from the disk."""
    found = {}
    for way in ("cached", "cold"):
        costs = []
        for _ in range(rounds):
            with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                costs.append(process.submit(opening, root, way == "cold").result())
        columns = zip(*map(dataclasses.astuple, costs), strict=True)
        found[way] = OpeningCost(*(statistics.median(values) for values in columns))
    return found


def main(config: OpeningCostConfig) -> None:
    results: dict[str, dict[str, float]] = {}
    print(f"{processor()}; medians of {config.rounds}")
    print("| images | index | from | dataset.json | split | private memory |\n" + "| --- " * 6 + "|")
    for images in config.images:
        root = config.work / f"opening-{images}"
        try:
            make_set(root, images, config.classes)
            size = (root / "train.arrow").stat().st_size / 1e6
            for way, cost in measure(root, config.rounds).items():
                times = f"{1e3 * cost.dataset_s:.0f} ms | {1e3 * cost.split_s:.0f} ms"
                print(f"| {images:,} | {size:,.0f} MB | {way} | {times} | {cost.private_mb:.1f} MB |", flush=True)
                results[f"{images}, {way}"] = dataclasses.asdict(cost)
        finally:
            shutil.rmtree(root, ignore_errors=True)
    if config.json is not None:
        write_json(config.json, results)


if __name__ == "__main__":
    run(OpeningCostConfig, main)
