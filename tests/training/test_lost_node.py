"""Workers and nodes that die under Ray: their shards are made again, and the set's bytes do not tell."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from jobs.cluster.connection import LostError, connected, stream
from tests import ROOT
from tests.photographs import write_source
from tests.processes import builders
from tests.raylets import lose, raylet_of, raylets
from tests.shard_sets import contents, make, planned

PER_SHARD = 2
DEADLINE_S = 300
CPUS = 2


@pytest.mark.slow
def test_a_lost_node_costs_time_and_no_byte(tmp_path: Path) -> None:
    source = write_source(tmp_path / "images", images=16, longest=700)
    uninterrupted = make(tmp_path / "uninterrupted", planned(source, per_shard=PER_SHARD))
    output = tmp_path / "out"
    with raylets(2) as cluster:
        _, other = cluster.list_all_nodes()
        job = [sys.executable, str(ROOT / "jobs" / "shard_imagenet.py"), "--source", str(source)]
        process = subprocess.Popen(
            [*job, "--output", str(output), "--samples-per-shard", str(PER_SHARD)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            deadline = time.monotonic() + DEADLINE_S
            # Both nodes are at work: some shards are done, and the node to be lost is in the midst of one.
            while not (len(list(output.glob("train/*.json"))) >= 2 and builders(raylet_of(other))):
                assert process.poll() is None, f"the job ended before its node was lost: {process.communicate()[1]}"
                assert time.monotonic() < deadline, "the node built no shard"
                time.sleep(0.002)
            lose(other)
            assert len(list(output.glob("*/*.json"))) < len(list(uninterrupted.glob("*/*.json")))
            _, said = process.communicate(timeout=DEADLINE_S)
        finally:
            process.kill()
            process.communicate()
    assert process.returncode == 0, said
    assert contents(output) == contents(uninterrupted)


def die_or_answer(folder: Path, call: int, deaths: int, attempt: int) -> Iterator[tuple[int, str]]:
    """A task whose worker is killed at its first attempts, in the midst of its answers."""
    with (folder / f"{call}").open("a") as tries:
        tries.write(f"{attempt}\n")
    yield attempt, "begun"
    if attempt < deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    yield attempt, "done"


@pytest.mark.slow
def test_a_call_whose_worker_dies_is_made_again_and_one_whose_workers_always_die_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    task = ray.remote(die_or_answer).options(num_cpus=1, max_retries=0, num_returns="streaming")
    with connected(CPUS, log_to_driver=False):
        answers = list(stream(task, [(tmp_path, 0, 0), (tmp_path, 1, 2), (tmp_path, 2, 1)], CPUS, attempts=3))
        with pytest.raises(LostError) as lost:
            list(stream(task, [(tmp_path, 3, 0), (tmp_path, 4, 9)], CPUS, attempts=3))
    assert sorted((call, attempt) for call, (attempt, what) in answers if what == "done") == [(0, 0), (1, 2), (2, 1)]
    assert (lost.value.number, lost.value.attempts) == (1, 3)
    tries = [(tmp_path / str(call)).read_text().split() for call in (0, 1, 2, 4)]
    assert tries == [["0"], ["0", "1", "2"], ["0", "1"], ["0", "1", "2"]]
