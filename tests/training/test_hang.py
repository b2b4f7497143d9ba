"""A worker that hangs in its own work is ended; one that is only slow, or waits for others, is left alone."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from jobs.training.failures import CollectiveTimeoutError, named_timeouts
from jobs.training.watchdog import each_limited
from model.parallel import data_parallel
from tests.processes import below
from tests.ranks import run_ranks
from tests.runs import ROOT, Run, assert_alike, tracebacks

LIMIT_S = 5.0
SLACK_S = 30.0  # For Ray to bring a line to the driver, on a busy machine.
HANGING_READ = """
import sys
from pathlib import Path
import torch
from jobs.training.data import WorkerData
from model.recipe import Recipe
from model.training import Worker
from pipeline.loading.reader_process import ReaderProcess

ReaderProcess.submit = lambda *arguments: None
data = WorkerData(Path(sys.argv[1]), Recipe(batch_size=9), Worker(0, 1, torch.device("cpu")), 9, 1, hang_seconds=1)
next(getattr(data, sys.argv[2])(*map(int, sys.argv[3:])))
"""
READ = r'pipeline/loading/reader_process\.py", line \d+ in result'
# No other thread of Python runs meanwhile, not even one that is to end the process.
HELD_LOCK = """
import ctypes
from jobs.training.watchdog import limited

def hold_the_lock():
    ctypes.PyDLL("libc.so.6").sleep(30)

with limited(1.0):
    hold_the_lock()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "place", "asked"),
    [
        (HANGING_READ, READ, ["training", "0", "0"]),
        (HANGING_READ, READ, ["validation"]),
        (HELD_LOCK, "in hold_the_lock", []),
    ],
    ids=["a read", "a read to validate on", "the interpreter's lock"],
)
def test_a_hang_ends_the_process_and_shows_its_place(
    shard_set: Path, program: str, place: str, asked: list[str]
) -> None:
    command = [sys.executable, "-c", program, str(shard_set), *asked]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert "Timeout (0:00:01)!" in done.stderr
    assert re.search(place, done.stderr), done.stderr


def test_only_the_wait_for_the_images_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """And each wait by itself. The loop's own work holds the exchange with the other ranks."""
    events: list[str] = []

    def read() -> Iterator[int]:
        events.append("read")
        yield 0
        raise OSError("the disk is gone")

    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, exit: events.append(f"at most {seconds}"))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: events.append("got"))
    items = each_limited(read(), 7.0)
    next(items)
    events.append("trained")
    with pytest.raises(OSError, match="the disk is gone"):
        next(items)
    assert events == ["at most 7.0", "read", "got", "trained", "at most 7.0", "got"]


def miss_an_exchange(rank: int, world: int, folder: Path) -> None:
    """Rank 1 takes no part in the second backward pass, nor in the exchange after it."""
    network = data_parallel(nn.Linear(2, 2), world)
    network(torch.ones(1, 2)).sum().backward()
    if rank == 1:
        # Until rank 0 has ended.
        (folder / "fifo").read_bytes()
        return
    with (folder / "fifo").open("wb"):
        for exchange in (
            lambda: network(torch.ones(1, 2)).sum().backward(),
            lambda: distributed.broadcast(torch.ones(1), src=1),
        ):
            with pytest.raises(CollectiveTimeoutError) as raised, named_timeouts(2):
                exchange()
            assert str(raised.value).startswith(
                f"{socket.gethostname()} waited 2 s for the other workers: look for one "
            )
        with pytest.raises(RuntimeError, match="out of memory"), named_timeouts(2):
            raise RuntimeError("out of memory")


@pytest.mark.slow
def test_an_exchange_that_does_not_end_is_one_line_with_its_cure(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    run_ranks(2, tmp_path, miss_an_exchange, tmp_path, timeout=timedelta(seconds=2))


@pytest.mark.long
def test_a_rank_that_hangs_or_that_nobody_hears_from_costs_the_steps_since_the_last_checkpoint(
    pair: Path, shard_set: Path, tmp_path: Path
) -> None:
    notes, storage = tmp_path / "notes", str(tmp_path / "runs")
    limits = ("--hang-seconds", LIMIT_S, "--collective-seconds", 40)
    # Ray's own check knows nothing of the first, and would be before the second.
    run = Run(shard_set, storage, 2, 2, *limits, notes=notes, RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S="600")

    def second_rank() -> int:
        run.wait_for("workers: ")
        return int(re.findall(r"rank \d is pid (\d+) on ", run.lines[-1])[1])

    rank = second_rank()
    run.wait_for("epoch 1/2 step 1/5")
    # As if the disk did not answer: those that read the validation's images, too, had no time to read ahead.
    readers = [pid for pid, line in below(rank).items() if "reader_process" in line]
    try:
        for pid in readers:
            os.kill(pid, signal.SIGSTOP)
        hung = time.time()
        run.wait_for("Timeout (0:00:05)!")
        assert LIMIT_S <= time.time() - hung < LIMIT_S + SLACK_S
        assert f"pid={rank})" in run.lines[-1]
        run.wait_for("in result")
        # As on a network that is wedged: the others are there, and nothing comes through.
        rank, begun = second_rank(), len(run.lines)
        run.wait_for("epoch 2/2 step 1/5")
        os.kill(rank, signal.SIGSTOP)
        run.wait_for("failure 2 of at most 4: rank 0: CollectiveTimeoutError: ")
        assert " waited 40 s for the other workers: " in run.lines[-1]
        assert "starting again from the last checkpoint" in run.lines[-1]
        assert run.end() == 0, run.text
    finally:
        for pid in readers:
            os.kill(pid, signal.SIGKILL)
    assert run.text.count("failure ") == 2, run.text
    assert not tracebacks(run.lines[begun:])
    assert_alike(pair, f"{storage}/run", shard_set, 2, 2, notes)
