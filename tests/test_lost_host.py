"""Hosts that die or cannot be reached while a run trains on them: the steps since the last checkpoint are lost."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from jobs import checkpoint
from tests import hosts
from tests.hosts import Host
from tests.processes import below
from tests.runs import ROOT, Followed, assert_alike, command, last, undisturbed

NOT_POSSIBLE = hosts.missing()
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(NOT_POSSIBLE is not None, reason=str(NOT_POSSIBLE)),
]
EPOCHS = 5
# Ray calls a host dead that has not answered for fifteen seconds instead of a minute.
IMPATIENT = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "2000"}
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


def test_a_lost_host_and_a_cut_cable_cost_the_steps_since_the_last_checkpoint(shard_set: Path, tmp_path: Path) -> None:
    whole = undisturbed(shard_set, tmp_path / "whole", 2, EPOCHS)
    storage = str(tmp_path / "runs")
    run = f"{storage}/run"
    # One core each: of the two workers one at most is on the first host, which is the cluster's head.
    with hosts.cluster(4, tmp_path / "disk", settings=IMPATIENT) as four:
        submit = ["ray", "job", "submit", "--address", f"http://{hosts.NETWORK}.1:8265", "--working-dir", ROOT]
        arguments = command(shard_set, storage, 2, EPOCHS, "--cpus-per-worker", 1)
        job = Followed(four[0].start(*submit, "--", "python", *arguments))

        kept = step_past(job, run, (0, 0))
        # A cable that is back in time costs time alone.
        shaken = next(host for host in four[1:] if trains(host))
        shaken.link("down")
        time.sleep(SHORT_S)
        shaken.link("up")
        kept = step_past(job, run, kept)
        assert "failure" not in job.text

        lost = shaken
        lost.kill()
        place = continued(job)
        assert place >= kept
        assert job.text.count("failure ") == 1, job.text

        kept = step_past(job, run, place)
        cut = next(host for host in four[1:] if host is not lost and trains(host))
        cut.link("down")
        assert continued(job) >= kept
        assert job.text.count("failure ") == 2, job.text
        # Back on the network the host learns that the cluster has given it up: its Ray ends, and the worker that was
        # waiting there for the others with it.
        cut.link("up")
        cut.process.wait(120)

        assert job.end() == 0, job.text
        assert_alike(whole, run, shard_set, EPOCHS, 2)
