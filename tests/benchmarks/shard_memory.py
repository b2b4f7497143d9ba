"""How much memory sharding takes: of the job and of its workers, as the data set grows, and for one hostile image.

    python -m tests.benchmarks.shard_memory --images 10000 100000

The images are tiny JPEGs under many names, in a tar of class tars: what the job keeps of each is its place, and what a
worker keeps is its shard of 256 x 256 JPEGs, neither of which depends on the size of the original. Memory is the
kernel's high-water mark of each process's resident size, looked at ten times a second; pages of libraries and of Ray's
shared memory count in each process that uses them. "Idle" is a process that has imported the same and done nothing.

Beside it, each in a process of its own, images of just less than the 80 megapixels that are allowed, as somebody who
wants to fill the memory would make them.
"""

from __future__ import annotations

import dataclasses
import io
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from jobs.cli.command import run
from pipeline.dataset.info import read_dataset
from pipeline.images.decode import MAX_PIXELS
from tests.benchmarks.contest import check_least
from tests.benchmarks.plan_cost import high_water_mb
from tests.processes import BUILDING, below, outside_clusters

ROOT = Path(__file__).resolve().parents[2]
MB = 1e6
CLASSES = 100
VARIANTS = 50
LOOK_EVERY_S = 0.1
IDLE = "import jobs.shard_imagenet"
CONVERTER = "import sys; from pipeline.images.resize import convert"
CONVERT = f"{CONVERTER}; convert(open(sys.argv[1], 'rb').read(), 90)"
WAIT = "; print(flush=True); input()"  # Until its high-water mark was read.


@dataclasses.dataclass(frozen=True)
class ShardMemoryConfig:
    images: tuple[int, ...] = (10_000, 100_000)
    """Sizes of the sets to make, each at least 1,000."""
    workers: int = 2
    """Shards built at a time."""
    side: int = 16
    """Of the images, in pixels."""
    hostile: bool = True
    """Also measure single images of 80 megapixels, which take 2.2 GB."""
    work: Path | None = None
    """Folder for what is made; by default one for temporary files. 1 GB for 100,000 images."""

    def __post_init__(self) -> None:
        check_least(self, "images", least=1000)
        check_least(self, "workers", "side")


@dataclasses.dataclass(frozen=True)
class ShardMemory:
    """Of one set. Peaks in MB."""

    images: int
    seconds: float
    driver: float
    worker: float
    """Of the largest worker."""
    everything: float
    """Of all processes of the job together, Ray's own included, each at its own peak."""
    stored: float
    """Bytes of a stored image, tar headers included."""


def write_tar(path: Path, images: int, side: int) -> None:
    """A tar of class tars with so many images, of few that differ."""
    generator = np.random.default_rng(0)
    few = []
    for _ in range(VARIANTS):
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, "JPEG")
        few.append(buffer.getvalue())
    with tarfile.open(path, "w") as outer:
        for number in range(CLASSES):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for i in range(number, images, CLASSES):
                    _add(tar, f"n{number:08d}_{i}.JPEG", few[i % VARIANTS])
            _add(outer, f"n{number:08d}.tar", inner.getvalue())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def peak_mb(pid: int) -> float:
    """The largest resident size of a process so far; 0 where it has ended."""
    try:
        return high_water_mb(pid)
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return 0.0


def measure(source: Path, images: int, workers: int, output: Path) -> ShardMemory:
    """Runs the job as a user does."""
    job = [sys.executable, str(ROOT / "jobs" / "shard_imagenet.py"), "--source", str(source)]
    kept = outside_clusters()
    begun = time.monotonic()
    process = subprocess.Popen(
        [*job, "--output", str(output), "--workers", str(workers)],
        env={**kept, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )
    peaks: dict[int, float] = {}
    building: set[int] = set()
    while process.poll() is None:
        there = {process.pid: "", **below(process.pid)}
        building |= {pid for pid, line in there.items() if line.startswith(BUILDING)}
        for pid in there:
            peaks[pid] = max(peaks.get(pid, 0.0), peak_mb(pid))
        time.sleep(LOOK_EVERY_S)
    if process.returncode:
        raise ValueError(f"the job failed with status {process.returncode}")
    seconds = time.monotonic() - begun
    worker = max(peaks[pid] for pid in building)
    stored = sum(split.bytes for split in read_dataset(output).splits.values()) / images
    return ShardMemory(images, seconds, peaks[process.pid], worker, sum(peaks.values()), stored)


def peak_of(program: str, *arguments: str) -> float:
    """The largest resident size of a Python that runs a program."""
    process = subprocess.Popen(
        [sys.executable, "-c", program + WAIT, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    peak = peak_mb(process.pid)
    process.communicate("\n")
    if process.returncode:
        raise ValueError(f"{program!r} failed with status {process.returncode}")
    return peak


def hostile(folder: Path) -> dict[str, Path]:
    """Images of little less than MAX_PIXELS, by what is nasty about them."""
    side = int(MAX_PIXELS**0.5)
    picture = Image.fromarray(np.full((side, side, 3), 99, np.uint8))
    paths: dict[str, Path] = {}
    for name, form, options in (
        ("JPEG, baseline", "JPEG", {}),
        ("JPEG, progressive, 4:4:4", "JPEG", {"progressive": True, "subsampling": 0}),
        ("PNG with alpha", "PNG", {"compress_level": 1}),
    ):
        paths[name] = folder / f"{len(paths)}.JPEG"
        made = picture.convert("RGBA") if form == "PNG" else picture
        made.save(paths[name], form, **options)
    return paths


def main(config: ShardMemoryConfig) -> None:
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, {config.workers} workers; peaks in MB")
    idle = peak_of(IDLE)
    with tempfile.TemporaryDirectory(dir=config.work) as name:
        folder = Path(name)
        print("| images | job | largest worker | with Ray's processes | stored image | time |")
        print(f"| --- | --- | --- | --- | --- | --- |\n| none (idle) | {idle:.0f} | | | | |", flush=True)
        for images in config.images:
            write_tar(folder / "images.tar", images, config.side)
            one = measure(folder / "images.tar", images, config.workers, folder / f"out-{images}")
            print(
                f"| {one.images:,} | {one.driver:.0f} | {one.worker:.0f} | {one.everything:,.0f} | "
                f"{one.stored:,.0f} bytes | {one.seconds:.0f} s |",
                flush=True,
            )
        if config.hostile:
            print(f"\n| one image of {MAX_PIXELS:,} pixels | peak | above idle |\n| --- | --- | --- |")
            idle = peak_of(CONVERTER)
            for what, path in hostile(folder).items():
                peak = peak_of(CONVERT, str(path))
                print(f"| {what}, {path.stat().st_size / MB:.1f} MB | {peak:,.0f} | {peak - idle:,.0f} |", flush=True)


if __name__ == "__main__":
    run(ShardMemoryConfig, main)
