"""What reading images from shards costs the loader, in each of the ways that they can be read.

    python -m tests.benchmarks.shard_reading --data SHARDS

Each way feeds the loader that training uses: one core, one decoder thread, the same images in the same order, turn and
turn about. Counted is the CPU time of the whole process, so that what else the machine does matters less; reading
alone, without the loader, is timed too, as its differences are smaller than the decoder's noise. Ways by memory map are
here to compare with only: a mapped file that is cut kills the process by SIGBUS.
"""

from __future__ import annotations

import dataclasses
import itertools
import mmap
import os
import platform
import statistics
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from jobs.cli import run
from pipeline.dataset import read_dataset, write_json
from pipeline.loader import PREFETCH, Loader
from pipeline.plan import Plan, colour_matrix
from pipeline.shard_file import ShardFile
from pipeline.split_reader import SplitReader

LIMIT = "memory map, unchecked"
OURS = "pread, CRC-32 (this program's)"
LARGEST = 2**18  # Bytes of one buffer of the ring.


@dataclasses.dataclass(frozen=True)
class ShardReadingConfig:
    data: Path
    """A shard set."""
    batch_size: int = 64
    """Images at a time."""
    batches: int = 12
    """In a round, of each way."""
    rounds: int = 15
    """Each figure is the median of so many."""
    json: Path | None = None
    """Also write the figures to this file."""

    def __post_init__(self) -> None:
        for field in ("batch_size", "batches", "rounds"):
            if getattr(self, field) < 1:
                raise ValueError(f"--{field.replace('_', '-')} is {getattr(self, field)}; it must be at least 1")


Read = Callable[[int, int, int | None], bytes | memoryview]


class StandIn:
    """In the place of a `ShardFile`, reads otherwise."""

    def __init__(self, read: Read) -> None:
        self.read = read


def ways(ring: int) -> dict[str, Callable[[Path], StandIn | ShardFile]]:
    """By name: what opens a shard to be read in that way.

    Args:
        ring: how many images the loader may hold at a time.
    """
    buffers = itertools.cycle([bytearray(LARGEST) for _ in range(ring)])

    def by_map(checked: bool) -> Callable[[Path], StandIn]:
        def opened(path: Path) -> StandIn:
            with path.open("rb") as file:
                view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

            def read(offset: int, size: int, crc32: int | None) -> memoryview:
                data = view[offset : offset + size]
                return verified(data, crc32) if checked else data

            return StandIn(read)

        return opened

    def unchecked(path: Path) -> StandIn:
        descriptor = os.open(path, os.O_RDONLY)
        return StandIn(lambda offset, size, crc32: os.pread(descriptor, size, offset))

    def into_ring(path: Path) -> StandIn:
        descriptor = os.open(path, os.O_RDONLY)

        def read(offset: int, size: int, crc32: int | None) -> memoryview:
            data = memoryview(next(buffers))[:size]
            if os.preadv(descriptor, [data], offset) != size:
                raise OSError(f"{path} ends early")
            return verified(data, crc32)

        return StandIn(read)

    return {
        LIMIT: by_map(False),
        "memory map, CRC-32": by_map(True),
        "pread, unchecked": unchecked,
        "preadv into buffers used again, CRC-32": into_ring,
        OURS: ShardFile,
    }


def verified(data: memoryview, crc32: int | None) -> memoryview:
    if crc32 is None or zlib.crc32(data) != crc32:
        raise ValueError("an image is not what its annotation says, or has no checksum: give a whole, annotated set")
    return data


def measure(config: ShardReadingConfig) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """CPU microseconds an image, of each way in each round: of the loader, and of reading alone."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    info = read_dataset(config.data)
    rows = info.splits["train"].shards
    loaders, readers = {}, {}
    for name, opened in ways((PREFETCH + 2) * config.batch_size).items():
        reader = SplitReader(config.data, info, "train")
        readers[name] = reader
        reader._files = [opened(config.data / "train" / f"{row.name}.tar") for row in rows]  # type: ignore[misc]
        loaders[name] = Loader(reader, info.rgb, config.batch_size, torch.device("cpu"), 1)
    plan = Plan(info.splits["train"].samples, config.batch_size, 0, colour_matrix(info.rgb))
    found: dict[str, list[float]] = {name: [] for name in loaders}
    alone: dict[str, list[float]] = {name: [] for name in loaders}
    turns = np.random.default_rng(0)  # No way always follows the same other.
    for epoch in range(config.rounds + 1):
        views = list(itertools.islice(plan.epoch(epoch), config.batches))
        for name in turns.permutation(list(loaders)):
            started = time.process_time()
            images = sum(len(batch) for batch in loaders[name].run(views))
            # The first round brings the shards into the cache and the buffers into being.
            if epoch:
                found[name].append(1e6 * (time.process_time() - started) / images)
        samples = [sample for step in views for sample in step.samples]
        for name in turns.permutation(list(readers)):
            started = time.process_time()
            for sample in samples:
                readers[name].image(sample)
            if epoch:
                alone[name].append(1e6 * (time.process_time() - started) / len(samples))
    return found, alone


def main(config: ShardReadingConfig) -> None:
    found, alone = measure(config)
    print(f"{platform.processor() or platform.machine()}, one core; CPU time an image, medians of {config.rounds}:")
    for name, values in found.items():
        ratios = [value / limit for value, limit in zip(values, found[LIMIT], strict=True)]
        spread = f"{min(ratios) - 1:+.1%} to {max(ratios) - 1:+.1%}"
        print(
            f"  {name:40s} loader {statistics.median(values):6.1f} us, {statistics.median(ratios) - 1:+6.1%} against "
            f"the first ({spread}); reading alone {statistics.median(alone[name]):5.1f} us"
        )
    if config.json is not None:
        write_json(config.json, {"loader": found, "reading": alone})


if __name__ == "__main__":
    run(ShardReadingConfig, main)
