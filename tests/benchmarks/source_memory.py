"""What listing a source and planning its shards costs the job: time, and memory above what it had before.

    python -m tests.benchmarks.source_memory --images 10000 100000 1281167

The source is a tar of 1,000 class tars, named as ImageNet's are, whose members are empty: listing reads headers and
nothing else. Written just before, it lies in the machine's memory; the real tar's headers lie 110 KB apart, so a disk
adds its own time for as many reads. Each size is measured in a process of its own. "Peak" is the growth of the kernel's
high-water mark of its resident size while listing and planning, "kept" the growth of the resident size that is left at
the end, with the listing and the plan of all shards.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from jobs.cli.command import run
from pipeline.sharding.shard_plan import plan_shards
from pipeline.sources.sources import read_source
from tests.benchmarks.contest import check_least
from tests.benchmarks.plan_cost import high_water_mb

ROOT = Path(__file__).resolve().parents[2]
MB = 1e6
CLASSES = 1000
SMALL = 2000  # Images of a source that is listed first, so that what a first call loads does not count.


@dataclasses.dataclass(frozen=True)
class SourceMemoryConfig:
    images: tuple[int, ...] = (10_000, 100_000, 1_281_167)
    """Sizes of the sources, each at least 2,000."""
    work: Path | None = None
    """Folder for the tars; by default one for temporary files. 700 MB for ImageNet's number of images."""
    one: Path | None = None
    """Measure this tar in this process and print the figures as JSON, as the program does for each size."""

    def __post_init__(self) -> None:
        check_least(self, "images", least=SMALL)


@dataclasses.dataclass(frozen=True)
class SourceMemory:
    """Of one source."""

    images: int
    listing_s: float
    planning_s: float
    peak_mb: float
    kept_mb: float


def write_tar(path: Path, images: int) -> None:
    """A tar of class tars with so many empty images."""
    ends = bytes(2 * tarfile.BLOCKSIZE)
    with path.open("wb") as file:
        for number in range(CLASSES):
            wnid = f"n{10_000_000 + number:08d}"
            members = [
                tarfile.TarInfo(f"{wnid}_{i}.JPEG").tobuf(tarfile.USTAR_FORMAT)
                for i in range(images // CLASSES + (number < images % CLASSES))
            ]
            inner = tarfile.TarInfo(f"{wnid}.tar")
            inner.size = sum(map(len, members)) + len(ends)
            file.write(inner.tobuf(tarfile.USTAR_FORMAT) + b"".join(members) + ends)
        file.write(ends)


def resident_mb() -> float:
    """The resident size of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MB


def measure(tar: Path, small: Path) -> SourceMemory:
    """Lists a source and plans its shards in this process, which must not have done so before."""
    plan_shards(read_source(small, None, 0.04, 0), 0, 1250)
    gc.collect()
    peak, kept = high_water_mb(), resident_mb()
    begun = time.perf_counter()
    listing = read_source(tar, None, 0.04, 0)
    listed = time.perf_counter()
    shards = plan_shards(listing, 0, 1250)
    planned = time.perf_counter()
    grown = high_water_mb() - peak
    gc.collect()
    left = resident_mb() - kept
    assert sum(len(shard.entries) for shard in shards) == listing.images
    return SourceMemory(listing.images, listed - begun, planned - listed, grown, left)


def main(config: SourceMemoryConfig) -> None:
    if config.one is not None:
        print(json.dumps(dataclasses.asdict(measure(config.one, config.one.with_name("small.tar")))))
        return
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs")
    print("| images | listing | planning | peak | kept | kept an image |\n| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(dir=config.work) as name:
        write_tar(Path(name) / "small.tar", SMALL)
        for images in config.images:
            tar = Path(name) / "images.tar"
            write_tar(tar, images)
            command = [sys.executable, "-m", "tests.benchmarks.source_memory", "--one", str(tar)]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            one = SourceMemory(**json.loads(done.stdout))
            print(
                f"| {one.images:,} | {one.listing_s:.1f} s | {one.planning_s:.2f} s | {one.peak_mb:.0f} MB | "
                f"{one.kept_mb:.0f} MB | {one.kept_mb * MB / one.images:.0f} bytes |",
                flush=True,
            )


if __name__ == "__main__":
    run(SourceMemoryConfig, main)
