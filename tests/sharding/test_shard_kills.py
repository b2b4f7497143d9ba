"""A sharding job that is killed again and again: the same command, started anew each time, ends with the same bytes.

    python -m tests.sharding.test_shard_kills --kills 20

kills workers and drivers in turn, with SIGKILL, and says when each died. The suite does the same with fewer kills.
The moments come from the job's own writing, which the kernel reports: the n-th thing that happens to a file of the set,
with n drawn from a fixed seed, so that a kill falls between a file's first byte and its rename as well as in between.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import random
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

import pytest

from jobs.cli.command import run
from tests.photographs import write_source
from tests.processes import builders, outside_clusters
from tests.shard_sets import contents, make, planned

ROOT = Path(__file__).resolve().parents[2]
PER_SHARD = 2
DEADLINE_S = 300
KILLS = 4  # In the suite.


class Writing:
    """What happens to the files of a folder and of the folders in it, as the kernel tells it (inotify)."""

    CREATED, MODIFIED, RENAMED = 0x100, 0x2, 0x80
    _EVENT = struct.Struct("iIII")

    def __init__(self, root: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._file = self._libc.inotify_init1(os.O_CLOEXEC)
        assert self._file >= 0, os.strerror(ctypes.get_errno())
        self._folders: dict[int, Path] = {}
        for folder in (root, *(path for path in root.iterdir() if path.is_dir())):
            self._watch(folder)

    def __enter__(self) -> Writing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def next(self, job: subprocess.Popen[bytes]) -> list[Path]:
        """The files something has happened to since, after waiting for at least one; none if the job has ended."""
        deadline = time.monotonic() + DEADLINE_S
        while not select.select([self._file], [], [], 1.0)[0]:
            if job.poll() is not None:
                return []
            assert time.monotonic() < deadline, "the job wrote nothing more"
        data, position, touched = os.read(self._file, 65536), 0, []
        while position < len(data):
            watched, mask, _, length = self._EVENT.unpack_from(data, position)
            position += self._EVENT.size
            path = self._folders[watched] / data[position : position + length].rstrip(b"\0").decode()
            position += length
            touched.append(path)
            if mask & self.CREATED and path.is_dir():
                self._watch(path)
        return touched

    def _watch(self, folder: Path) -> None:
        mask = self.CREATED | self.MODIFIED | self.RENAMED
        watched = self._libc.inotify_add_watch(self._file, os.fsencode(folder), mask)
        assert watched >= 0, os.strerror(ctypes.get_errno())
        self._folders[watched] = folder


@dataclasses.dataclass(frozen=True)
class Kill:
    """One that was made."""

    whom: str
    after: str
    """The file that was touched last."""
    half_written: int
    """Temporary files that were there just afterwards."""
    done: int
    """Annotations that were there."""


def start(source: Path, output: Path) -> subprocess.Popen[bytes]:
    kept = outside_clusters()
    job = [sys.executable, str(ROOT / "jobs" / "shard_imagenet.py"), "--source", str(source), "--output", str(output)]
    with log(output).open("w") as said:
        return subprocess.Popen(
            [*job, "--workers", "2", "--samples-per-shard", str(PER_SHARD)],
            env={**kept, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=said,
        )


def log(output: Path) -> Path:
    """What the job says on stderr."""
    return output.with_name(f"{output.name}.log")


def kill_at(
    job: subprocess.Popen[bytes],
    writing: Writing,
    output: Path,
    events: int,
    pattern: str,
    worker: random.Random | None,
) -> Kill:
    """Kills after so many things that happen to files that the pattern fits: the job, or a worker of it by chance."""
    while True:
        touched = writing.next(job)
        assert touched, f"the job ended before its kill: {log(output).read_text()}"
        fitting = [path for path in touched if path.match(pattern)]
        events -= len(fitting)
        if events > 0 or not fitting:
            continue
        at_work = builders(job.pid) if worker is not None else [job.pid]
        if at_work:
            victim = worker.choice(at_work) if worker is not None else job.pid
            os.kill(victim, signal.SIGKILL)
            break
    if worker is None:
        job.wait()
    half_written = len(list(output.rglob(".*.tmp")))
    done = len(list(output.glob("*/*-*.json")))
    whom = "driver" if worker is None else "worker"
    return Kill(whom, str(fitting[-1].relative_to(output)), half_written, done)


def make_killed(source: Path, output: Path, kills: int, seed: int) -> list[Kill]:
    """Makes a set with so many kills, of a worker and of the driver in turn; the last one falls on `dataset.json`.

    What is done when a driver is killed is kept as it is.
    """
    output.mkdir()
    chance = random.Random(seed)
    made: list[Kill] = []
    kept: dict[Path, int] = {}
    while len(made) < kills:
        job = start(source, output)
        try:
            with Writing(output) as writing:
                if len(made) < kills - 1:
                    made.append(kill_at(job, writing, output, chance.randint(1, 12), "*-*", chance))
                if len(made) == kills - 1:
                    made.append(kill_at(job, writing, output, 1, ".dataset.json.*", None))
                else:
                    made.append(kill_at(job, writing, output, chance.randint(1, 12), "*", None))
        finally:
            job.kill()
            job.wait()
        print(*made[-2:], sep="\n", flush=True)
        done = (path.with_suffix(".tar") for path in output.glob("*/*-*.json"))
        kept |= {path: path.stat().st_mtime_ns for path in done}
    job = start(source, output)
    assert job.wait(DEADLINE_S) == 0, log(output).read_text()
    assert kept, "no shard was done when a driver was killed"
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    return made


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("kills") / "images", images=16, longest=700)


@pytest.mark.slow
def test_kills_of_workers_and_drivers_leave_no_trace(images: Path, tmp_path: Path) -> None:
    uninterrupted = make(tmp_path / "uninterrupted", planned(images, per_shard=PER_SHARD))
    made = make_killed(images, tmp_path / "out", KILLS, seed=0)
    assert [kill.whom for kill in made] == ["worker", "driver"] * (KILLS // 2)
    # Hidden files count: nothing half written and no lock is left.
    assert contents(tmp_path / "out") == contents(uninterrupted)


@dataclasses.dataclass(frozen=True)
class KillsConfig:
    """The command line of the long form."""

    kills: int = 20
    """How often to kill, an even number: workers and drivers in turn."""
    images: int = 100
    """Images of each of three classes."""
    seed: int = 0
    """Decides the moments."""

    def __post_init__(self) -> None:
        if self.kills < 2 or self.kills % 2:
            raise ValueError(f"--kills {self.kills} must be an even number from 2 on")
        if self.images < 10:
            raise ValueError(f"--images {self.images} must be at least 10")


def main(config: KillsConfig) -> None:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_source(folder / "images", images=config.images, longest=700)
        uninterrupted = contents(make(folder / "uninterrupted", planned(source, per_shard=PER_SHARD)))
        made = make_killed(source, folder / "out", config.kills, config.seed)
        killed = contents(folder / "out")
    drivers = sum(kill.whom == "driver" for kill in made)
    inside = sum(kill.half_written > 0 for kill in made)
    print(
        f"{drivers} drivers and {len(made) - drivers} workers killed, {inside} with a file half written; "
        f"{len(uninterrupted)} files, {time.monotonic() - begun:.0f} s"
    )
    different = sorted(name for name in {*uninterrupted, *killed} if uninterrupted.get(name) != killed.get(name))
    if different:
        raise ValueError(f"the killed set differs from the uninterrupted one in {', '.join(different)}")
    print("every file as in an uninterrupted run, and none besides")


if __name__ == "__main__":
    run(KillsConfig, main)
