"""The lock of a shard set, between processes: a second job is refused, a killed one leaves nothing locked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.sharding.set_lock import LOCK_FILE, JobLock, LockedError, at_work

HOLD_JOB = "with JobLock(root, print): print('held', flush=True); sys.stdin.read()"
HOLD_WORK = "with at_work(root): print('held', flush=True); sys.stdin.read()"


def holder(root: Path, code: str) -> subprocess.Popen[str]:
    """Another process that holds a lock until its stdin ends."""
    head = (
        "import sys; from pathlib import Path; from pipeline.sharding.set_lock import JobLock, at_work; "
        "root = Path(sys.argv[1])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", f"{head}\n{code}", str(root)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_job_is_refused_and_a_killed_one_is_not_in_the_way(tmp_path: Path) -> None:
    first = holder(tmp_path, HOLD_JOB)
    with pytest.raises(LockedError, match=rf"another job is at work on .* \(process {first.pid} on .*another --output"):
        JobLock(tmp_path, print).__enter__()
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (tmp_path / LOCK_FILE).exists()
    with JobLock(tmp_path, print):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_job_waits_for_workers_of_a_killed_one(tmp_path: Path) -> None:
    job = holder(tmp_path, HOLD_JOB)
    worker = holder(tmp_path, HOLD_WORK)
    job.kill()
    job.wait()
    with pytest.raises(LockedError, match="workers of a killed job or a lost node still write"):
        JobLock(tmp_path, print, patience_s=0.0).__enter__()
    told: list[str] = []

    def end_worker(line: str) -> None:
        told.append(line)
        worker.kill()
        worker.wait()

    with JobLock(tmp_path, end_worker):
        pass
    assert len(told) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_worker_without_a_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LockedError, match="found no job at work"), at_work(tmp_path):
        pass


def test_the_lock_stays_for_the_next_job_while_workers_are_at_work(tmp_path: Path) -> None:
    with JobLock(tmp_path, print):
        worker = holder(tmp_path, HOLD_WORK)
    assert (tmp_path / LOCK_FILE).exists()
    worker.kill()
    worker.wait()
