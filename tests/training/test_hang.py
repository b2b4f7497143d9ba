"""A worker that hangs in its own work is ended; one that is only slow, or waits for others, is left alone."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from jobs.training.config import TrainConfig
from jobs.training.watchdog import LimitedData
from model.metrics import LabeledImages
from tests.processes import below
from tests.runs import ROOT, Run, assert_alike

LIMIT_S = 5.0
SLACK_S = 30.0  # For Ray to bring a line to the driver, on a busy machine.
HANGING_READ = """
import sys
from pathlib import Path
import torch
from jobs.training.data import WorkerData
from jobs.training.watchdog import LimitedData
from model.recipe import Recipe
from model.training import Worker
from pipeline.loading.reader_process import ReaderProcess

ReaderProcess.submit = lambda *arguments: None
data = WorkerData(Path(sys.argv[1]), Recipe(batch_size=9), Worker(0, 1, torch.device("cpu")), 9, 1)
next(LimitedData(data, 1.0).training(0, 0))
"""
HELD_LOCK = """
import re
from jobs.training.watchdog import limited

with limited(1.0):
    re.match("(a+)+$", "a" * 100 + "b")
"""


@pytest.mark.parametrize(
    ("program", "place"),
    [(HANGING_READ, r'pipeline/loading/reader_process\.py", line \d+ in result'), (HELD_LOCK, "in match")],
)
def test_a_hang_ends_the_process_and_shows_its_place(shard_set: Path, program: str, place: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program, shard_set], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 1
    assert "Timeout (0:00:01)!" in done.stderr
    assert re.search(place, done.stderr), done.stderr


def test_only_the_wait_for_the_images_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """And each wait by itself. The loop's own work holds the exchange with the other ranks."""
    events: list[str] = []

    class Data:
        steps = 2

        def training(self, epoch: int, first_step: int) -> Iterator[Sequence[LabeledImages]]:
            return self.validation()

        def validation(self) -> Iterator[Any]:
            events.append("read")
            yield ()
            raise OSError("the disk is gone")

    def train() -> None:
        for _ in LimitedData(Data(), 7.0).training(0, 0):
            events.append("trained")

    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, exit: events.append(f"at most {seconds}"))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: events.append("got"))
    with pytest.raises(OSError, match="the disk is gone"):
        train()
    assert events == ["at most 7.0", "read", "got", "trained", "at most 7.0", "got"]


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_limit_that_cannot_pass_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match=r"--hang-seconds is .*; it must be above 0"):
        TrainConfig("shards", "runs", "run", hang_seconds=seconds)


@pytest.mark.long
def test_a_rank_that_hangs_in_a_live_process_costs_the_steps_since_the_last_checkpoint(
    pair: Path, shard_set: Path, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    run = Run(
        shard_set,
        str(tmp_path / "runs"),
        2,
        2,
        "--hang-seconds",
        LIMIT_S,
        notes=notes,
        # Ray's own check, which knows nothing of such a hang, is to find nothing on a busy machine either.
        RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S="120",
    )
    run.wait_for("workers: ")
    pids = re.findall(r"rank \d is pid (\d+) on ", run.lines[-1])
    run.wait_for("epoch 2/2 step 1/5")
    # As if the disk did not answer: those that read the validation's images, too, had no time to read ahead.
    readers = [pid for pid, line in below(int(pids[1])).items() if "reader_process" in line]
    try:
        for pid in readers:
            os.kill(pid, signal.SIGSTOP)
        hung = time.time()
        run.wait_for("Timeout (0:00:05)!")
        found = time.time() - hung
        assert f"pid={pids[1]})" in run.lines[-1]
        assert LIMIT_S <= found < LIMIT_S + SLACK_S
        run.wait_for("in result")
        run.wait_for("continuing after epoch 1, step ")
        run.wait_for("epoch 2/2 step ")
        print(f"hang to its line {found:.1f} s, to the next step {time.time() - hung:.1f} s")
        assert run.end() == 0, run.text
    finally:
        for pid in readers:
            os.kill(pid, signal.SIGKILL)
    assert run.text.count("failure ") == 1, run.text
    assert_alike(pair, str(tmp_path / "runs" / "run"), shard_set, 2, 2, notes)
