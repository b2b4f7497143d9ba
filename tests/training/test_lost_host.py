"""Hosts that die, are taken back or cannot be reached while a run trains on them.

At most the steps since the last checkpoint are lost.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.training import checkpoint
from tests import hosts
from tests.hosts import Host
from tests.processes import below
from tests.runs import Followed, assert_alike, command, last

pytestmark = [pytest.mark.long, hosts.NEEDED]
EPOCHS = 2
SHORT_S = 3.0


def trains(host: Host) -> bool:
    """Whether one of the run's workers is on the host."""
    return any(line.startswith("ray::RayTrainWorker") for line in below(host.process.pid).values())


def continued(job: Followed) -> tuple[int, int]:
    """Reads on to where the run takes up again; the epochs and steps that it has kept."""
    job.wait_for("continuing after epoch ")
    match = re.search(r"after epoch (\d+), step (\d+)", job.lines[-1])
    assert match is not None
    return int(match[1]), int(match[2])


def step_past(job: Followed, run: str, place: tuple[int, int]) -> tuple[int, int]:
    """Reads on until a checkpoint later than a place is committed; where that is."""
    job.wait_for(" step ")
    while not checkpoint.committed(run) or last(run) <= place:
        job.wait_for(" step ")
    return last(run)


def inside_an_epoch(run: str) -> bool:
    """Whether a checkpoint is committed that is not one of an epoch's end."""
    return any(kept.progress.step for kept in checkpoint.committed(run).values())


@contextlib.contextmanager
def training(shards: Path, folder: Path, checkpoint_every: int = 2) -> Iterator[tuple[list[Host], Followed, str]]:
    """Three hosts of one core each, of which two train, a job submitted from a fourth, and its run's folder.

    One of the two workers at most is on the first host, the cluster's head; the fourth offers nothing to Ray.
    """
    with hosts.cluster((1, 1, 1, 0), folder / "disk", settings=hosts.IMPATIENT) as four:
        storage, cores, notes = str(folder / "runs"), ("--cpus-per-worker", 1), folder / "notes"
        every = ("--checkpoint-every", checkpoint_every)
        arguments = command(shards, storage, 2, EPOCHS, *cores, *every, notes=notes)
        job = Followed(four[3].start(*hosts.SUBMIT, *arguments))
        yield four[:3], job, str(folder / "runs" / "run")


def test_a_host_that_is_taken_back_with_notice_costs_nothing(pair: Path, shard_set: Path, tmp_path: Path) -> None:
    with training(shard_set, tmp_path, checkpoint_every=0) as (three, job, run):
        job.wait_for("epoch 1/2 step 1/5")
        taken = next(host for host in three[1:] if trains(host))
        notice = ["ray", "drain-node", f"--address={hosts.NETWORK}.1:6379", "--reason=DRAIN_NODE_REASON_PREEMPTION"]
        told = taken.run(*notice, "--reason-message=spot", "--deadline-remaining-seconds=60")
        assert told.returncode == 0, told.stderr
        job.wait_for("draining: node(s) ")
        assert re.search(r"with rank\(s\) \[[01]\], \d+ s left; writing a checkpoint", job.lines[-1])
        # Else only an epoch's end writes one; that of this epoch may be there by now as well.
        while not inside_an_epoch(run):
            job.wait_for(" step ")
        kept = last(run)
        taken.kill()
        assert continued(job) >= kept
        assert job.end() == 0, job.text
        assert_alike(pair, run, shard_set, EPOCHS, 2, tmp_path / "notes")


def test_a_cut_cable_costs_time_or_the_steps_since_the_last_checkpoint(
    pair: Path, shard_set: Path, tmp_path: Path
) -> None:
    with training(shard_set, tmp_path) as (three, job, run):
        kept = step_past(job, run, (0, 0))
        cut = next(host for host in three[1:] if trains(host))
        cut.link("down")
        time.sleep(SHORT_S)
        cut.link("up")
        kept = step_past(job, run, kept)
        assert "failure" not in job.text

        cut.link("down")
        assert continued(job) >= kept
        assert job.text.count("failure ") == 1, job.text
        # Back on the network the host learns that the cluster has given it up: its Ray ends, and with it the worker
        # that was waiting there for the other.
        cut.link("up")
        cut.process.wait(120)
        assert job.end() == 0, job.text
        assert_alike(pair, run, shard_set, EPOCHS, 2, tmp_path / "notes")
