"""A sharding job that is killed again and again: the same command, started anew each time, ends with the same bytes.

Workers and the job itself are killed in turn, with SIGKILL, each after so many changes of the set's folder, a number
drawn from a fixed seed: so a kill falls between a file's first byte and its rename as well as in between.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.photographs import write_source
from tests.processes import JOBS, builders, outside_clusters
from tests.shard_sets import contents, make, planned

PER_SHARD = 2
DEADLINE_S = 300


def start(source: Path, output: Path) -> subprocess.Popen[bytes]:
    job = [sys.executable, JOBS / "shard_imagenet.py", "--source", source, "--output", output]
    with log(output).open("w") as said:
        return subprocess.Popen(
            [*map(str, job), "--workers", "2", "--samples-per-shard", str(PER_SHARD)],
            env={**outside_clusters(), "PYTHONPATH": str(JOBS.parent)},
            stdout=subprocess.DEVNULL,
            stderr=said,
        )


def log(output: Path) -> Path:
    """What the job says on stderr."""
    return output.with_name(f"{output.name}.log")


def files(output: Path, pattern: str = "*") -> set[Path]:
    return set(output.rglob(pattern))


def wait_for_changes(job: subprocess.Popen[bytes], output: Path, count: int) -> None:
    """Until so many files, those being written included, came or went."""
    seen, deadline = files(output), time.monotonic() + DEADLINE_S
    while count > 0:
        assert job.poll() is None, f"the job ended before its kill: {log(output).read_text()}"
        assert time.monotonic() < deadline, "the job wrote nothing more"
        time.sleep(0.001)
        now = files(output)
        count -= len(now ^ seen)
        seen = now


def kill_worker_and_job(job: subprocess.Popen[bytes], output: Path, chance: random.Random) -> None:
    """Kills a worker that builds a shard and, once a shard is done that can be kept, the job."""
    wait_for_changes(job, output, chance.randint(1, 12))
    while not (workers := builders(job.pid)):
        wait_for_changes(job, output, 1)
    os.kill(chance.choice(workers), signal.SIGKILL)
    wait_for_changes(job, output, chance.randint(1, 12))
    while not files(output, "*-*.json"):
        wait_for_changes(job, output, 1)
    job.kill()
    job.wait()


# The longer one is that of docs/faults.md.
@pytest.mark.parametrize(
    ("rounds", "images"),
    [pytest.param(1, 16, marks=pytest.mark.slow), pytest.param(10, 100, marks=pytest.mark.long)],
)
def test_kills_of_workers_and_jobs_leave_no_trace(tmp_path: Path, rounds: int, images: int) -> None:
    source, output = write_source(tmp_path / "images", images, longest=700), tmp_path / "out"
    uninterrupted = contents(make(tmp_path / "uninterrupted", planned(source, per_shard=PER_SHARD)))
    output.mkdir()
    chance, kept = random.Random(0), dict[Path, int]()
    for number in range(rounds):
        job = start(source, output)
        try:
            kill_worker_and_job(job, output, chance)
        finally:
            job.kill()
            job.wait()
        done = {path.with_suffix(".tar") for path in files(output, "*-*.json")}
        print(f"round {number + 1}: {len(done)} shards done, {len(files(output, '.*.tmp'))} files half written")
        kept |= {path: path.stat().st_mtime_ns for path in done}
    job = start(source, output)
    assert job.wait(DEADLINE_S) == 0, log(output).read_text()
    # Hidden files count: nothing half written and no lock is left.
    assert contents(output) == uninterrupted
    # What was done when the job was killed was not built again.
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
