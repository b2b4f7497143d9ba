"""What the host spends on an image besides decoding it, and the rate of its whole path from the page cache to a batch.

    python -m tests.benchmarks.host_path --data SHARDS

The loader is the one that training uses, but that its graph has no decoder: it takes the images' bytes and every
argument of the plan, and gives one pixel an image. Then each part of the path alone. Pixels are read from a decoded
cache, which is made in a temporary folder.

Processor time in the thread that trains does not tell what that thread loses: between two operators it may have to wait
for the interpreter's lock. So the loader also runs beside a loop of small operators, and it is counted too by how much
that takes longer.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from nvidia.dali import fn

from jobs.cli.command import run
from jobs.cli.device import processor
from pipeline.dataset.info import read_dataset, write_json
from pipeline.dataset.split_reader import SplitReader
from pipeline.loading import graph
from pipeline.loading.loader import Loader
from pipeline.loading.plan import Plan, PlannedBatch, color_matrix
from pipeline.loading.reader_process import SharedMemory, read_into
from pipeline.staging.decoded_cache import stage_pixels
from tests.benchmarks.contest import check_least

TICKS = os.sysconf("SC_CLK_TCK")
OPERATORS = 1500  # Of a step; together 2.7 ms on the machine of docs/benchmarks.md.


@dataclasses.dataclass(frozen=True)
class HostPathConfig:
    data: Path
    """A shard set on a local disk, small enough for the page cache; 2,000 training images or more."""
    batch_sizes: tuple[int, ...] = (128, 1024)
    images: int = 60_000
    """Each measurement goes through so many."""
    rounds: int = 3
    """Each figure is the median of so many."""
    json: Path | None = None
    """Also write the figures to this file."""

    def __post_init__(self) -> None:
        check_least(self, "batch_sizes", "rounds")
        check_least(self, "images", least=4)


def first_pixel(jpegs: Any, **decoding: object) -> Any:
    """In the place of DALI's decoder: one pixel made of each image's first bytes."""
    return fn.reshape(fn.slice(jpegs, 0, 3, axes=[0]), shape=[1, 1, 3], layout="HWC")


def reader_seconds() -> float:
    """Processor time of this process's children so far."""
    total = 0
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


def path_costs(reader: SplitReader, root: Path, batch_size: int, images: int) -> dict[str, float]:
    """One measurement of the whole path, in microseconds of processor time an image, and its rate."""
    info = read_dataset(root)
    plan = Plan(len(reader), min(batch_size, len(reader)), 0, color_matrix(info.rgb))

    with mock.patch.object(fn.decoders, "image", first_pixel), mock.patch.object(graph, "CROP_SIZE", 1):
        loader = Loader(reader, info.rgb, batch_size, torch.device("cpu"), 1)
    batches = loader.run(plan.endless())
    for _ in range(8):
        next(batches)
    count = -(-images // plan.batch_size)
    wall, mine, readers, process = time.perf_counter(), time.thread_time(), reader_seconds(), time.process_time()
    for batch in itertools.islice(batches, count):
        assert len(batch) == plan.batch_size
    done = count * plan.batch_size
    found = {
        "training_thread_us": 1e6 * (time.thread_time() - mine) / done,
        "readers_us": 1e6 * (reader_seconds() - readers) / done,
        "process_us": 1e6 * (time.process_time() - process) / done,
        "images_per_s": done / (time.perf_counter() - wall),
    }
    steps = max(8, count // 10)
    found["small_operators_us"] = (small_operators(steps, batches) - small_operators(steps)) / plan.batch_size
    return found


def small_operators(steps: int, batches: Iterator[object] | None = None) -> float:
    """Microseconds a step of a thread that does what one does that launches a GPU's kernels; each on its own batch."""
    numbers = torch.zeros(16)
    started = time.perf_counter()
    for _ in range(steps):
        if batches is not None:
            next(batches)
        for _ in range(OPERATORS):
            numbers.add_(1)
    return 1e6 * (time.perf_counter() - started) / steps


def part_costs(reader: SplitReader, root: Path, batch_size: int, batches: int = 20) -> dict[str, float]:
    """What parts of a batch cost, each alone, in microseconds an image."""
    info = read_dataset(root)
    plan = Plan(len(reader), min(batch_size, len(reader)), 0, color_matrix(info.rgb))
    some = list(itertools.islice(plan.endless(), batches))
    mean = np.array(info.rgb.mean) * 255
    files = sorted((root / "train").glob("*.rgb" if reader.pixels else "*.tar"))
    descriptors = [os.open(path, os.O_RDONLY) for path in files]
    room = bytearray(int(reader.index.sizes.max()))

    def pread(planned: PlannedBatch) -> None:
        index = reader.index
        for shard, offset, size in zip(
            *(part[planned.samples].tolist() for part in (index.shards, index.offsets, index.sizes)), strict=True
        ):
            os.preadv(descriptors[shard], (memoryview(room)[:size],), offset)

    def crc(planned: PlannedBatch) -> None:
        for size in reader.index.sizes[planned.samples].tolist():
            zlib.crc32(memoryview(room)[:size])

    slot = SharedMemory(1, batch_size, reader.row_bytes).slots[0]

    parts: dict[str, Callable[[PlannedBatch], object]] = {
        "draw": lambda planned: planned.draw(planned.samples),
        "look_up": lambda planned: [
            part[planned.samples].tolist()
            for part in (reader.index.shards, reader.index.offsets, reader.index.sizes, reader.index.checksums)
        ],
        "preadv": pread,
        **({} if reader.pixels else {"crc32": crc}),
        "prepare": lambda planned: read_into(slot, reader, mean, planned),
    }
    found = {}
    for name, part in parts.items():
        for planned in some[:2]:
            part(planned)
        started = time.thread_time()
        for planned in some:
            part(planned)
        found[name] = 1e6 * (time.thread_time() - started) / sum(map(len, some))
    for descriptor in descriptors:
        os.close(descriptor)
    return found


def main(config: HostPathConfig) -> None:
    torch.set_num_threads(1)
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        cache = stage_pixels(str(config.data), Path(folder), lambda _: None, os.cpu_count() or 1)
        for form, root in (("JPEG", config.data), ("pixels", cache)):
            reader = SplitReader(root, read_dataset(root), "train")
            for batch_size in config.batch_sizes:
                images = config.images if form == "JPEG" else config.images // 4
                rounds = [path_costs(reader, root, batch_size, images) for _ in range(config.rounds)]
                costs = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
                parts = [part_costs(reader, root, batch_size) for _ in range(config.rounds)]
                costs |= {name: statistics.median(one[name] for one in parts) for name in parts[0]}
                results[f"{form}, {batch_size}"] = costs
    names = list(dict.fromkeys(name for costs in results.values() for name in costs))
    split = read_dataset(config.data).splits["train"]
    size = split.bytes / split.samples / 1000
    print(f"{processor()}, {os.cpu_count()} cores; JPEGs of {size:.1f} KB; medians of {config.rounds}")
    print(f"| microseconds an image | {' | '.join(results)} |")
    print("| --- " * (len(results) + 1) + "|")
    for name in names:
        cells = [
            f"{costs[name]:,.{0 if name == 'images_per_s' else 2}f}" if name in costs else ""
            for costs in results.values()
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    if config.json is not None:
        write_json(config.json, results)


if __name__ == "__main__":
    run(HostPathConfig, main)
