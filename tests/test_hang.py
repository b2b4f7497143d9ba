"""A worker that hangs in its own work is named and ended; one that is only slow, or waits for others, is left alone."""

from __future__ import annotations

import itertools
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from jobs.data import WorkerData
from jobs.hang import LOOKS, Watch, WatchedData
from jobs.train_config import TrainConfig
from model.recipe import Recipe
from model.training import Worker
from pipeline.shard_file import ShardFile
from tests.runs import ROOT, Run, assert_alike, undisturbed

LIMIT_S = 5.0
SLACK_S = 30.0  # For Ray to bring a line to the driver, on a busy machine.
# Put before all else on PYTHONPATH: rank 1's next read of an image after ARMED is there never returns, once.
HANGING_READ = """
import os, threading, time
from pipeline import shard_file

read = shard_file.ShardFile.read_into

def hanging(self, room, offset, crc32):
    try:
        import ray.train
        if ray.train.get_context().get_world_rank() == 1:
            os.rename("ARMED", "HUNG")
            os.utime("HUNG")
            threading.Event().wait()
    except (OSError, RuntimeError):
        pass
    return read(self, room, offset, crc32)

shard_file.ShardFile.read_into = hanging
"""


class Ended(Exception):
    """Instead of the end of the process."""


def ended(line: str) -> None:
    raise Ended(line)


def look(watch: Watch, times: int) -> bool:
    return any(watch.look() for _ in range(times))


@pytest.fixture
def watch() -> Iterator[Watch]:
    """One whose own thread looks once in ten hours, so that only the test's looks count."""
    with Watch(3, 36000.0 * LOOKS, ended) as watch:
        yield watch


def test_a_read_that_never_returns_is_found_and_named(shard_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the watch's own thread, with the real clock, in the loader that training uses."""
    hanging, goes_on, left = threading.Event(), threading.Event(), threading.Event()
    said: list[str] = []
    read = ShardFile.read_into

    def stuck(file: ShardFile, room: memoryview, offset: int, crc32: int | None) -> None:
        hanging.set()
        goes_on.wait()
        read(file, room, offset, crc32)

    def leave(line: str) -> None:
        assert hanging.is_set()
        said.append(line)
        left.set()

    def train() -> None:
        recipe, worker = Recipe(batch_size=9), Worker(0, 1, torch.device("cpu"))
        with Watch(3, 1.0, leave) as watch:
            data = WatchedData(WorkerData(shard_set, recipe, worker, 9, 1), watch)
            next(data.training(1, 2))

    monkeypatch.setattr(ShardFile, "read_into", stuck)
    training = threading.Thread(target=train)
    training.start()
    assert left.wait(60)
    goes_on.set()
    training.join(60)
    (line,) = said
    match = re.fullmatch(
        rf"rank 3 on {socket.gethostname()} \(pid {os.getpid()}\) hangs: it has been getting its images of epoch 2, "
        r"step 3 for 1 s, at pipeline/loader\.py:(\d+) in _next; ending its process \(--hang-seconds 1\)",
        line,
    )
    assert match is not None, line
    source = (ROOT / "pipeline" / "loader.py").read_text().splitlines()
    assert "self._ahead.popleft().result()" in source[int(match[1]) - 1]


def test_a_piece_of_work_that_takes_the_limit_ends_the_process(watch: Watch) -> None:
    watch.begin("opening the shard set")
    # The first look only sees that the work has begun.
    assert not look(watch, LOOKS)
    with pytest.raises(Ended, match=r"rank 3 on .* hangs: it has been opening the shard set for 720000 s, at "):
        watch.look()


@pytest.mark.parametrize("between", [True, False])
def test_many_short_waits_are_no_hang_though_their_sum_is_long(watch: Watch, between: bool) -> None:
    """Each is as long as may be and called as the one before; the watch never looks between two of them."""
    for _ in range(5):
        watch.begin("getting its validation images")
        assert not look(watch, LOOKS)
        if between:
            watch.end()


def test_waiting_for_others_is_no_hang(watch: Watch) -> None:
    """The loop's own work, between one step's images and the next's, holds the exchange with the other ranks."""
    for _ in watch.each(iter(range(3)), itertools.repeat("getting its validation images")):
        assert not look(watch, 10 * LOOKS)
    assert not look(watch, 10 * LOOKS)


def test_after_an_error_nothing_is_watched(watch: Watch) -> None:
    def fails() -> Iterator[int]:
        yield 0
        raise OSError("the disk is gone")

    items = watch.each(fails(), itertools.repeat("getting its validation images"))
    with pytest.raises(OSError, match="the disk is gone"):
        list(items)
    assert not look(watch, 10 * LOOKS)


def test_a_process_is_ended_however_many_of_its_threads_are_stuck() -> None:
    program = (
        "import threading\n"
        "from jobs.hang import end_process\n"
        "def stuck(): threading.Event().wait()\n"
        "threading.Thread(target=stuck).start()\n"
        "end_process('rank 1 hangs')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout) == (1, "rank 1 hangs\n")
    assert "in stuck" in done.stderr


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_limit_that_cannot_pass_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match=r"--hang-seconds is .*; it must be above 0"):
        TrainConfig("shards", "runs", "run", hang_seconds=seconds)


@pytest.mark.long
@pytest.mark.slow
def test_a_rank_that_hangs_in_a_live_process_costs_the_steps_since_the_last_checkpoint(
    shard_set: Path, tmp_path: Path
) -> None:
    whole = undisturbed(shard_set, tmp_path / "whole", 2, 2)
    armed, hung = tmp_path / "armed", tmp_path / "hung"
    patch = tmp_path / "patch"
    patch.mkdir()
    (patch / "sitecustomize.py").write_text(HANGING_READ.replace("ARMED", str(armed)).replace("HUNG", str(hung)))
    run = Run(
        shard_set,
        str(tmp_path / "runs"),
        2,
        2,
        "--hang-seconds",
        LIMIT_S,
        PYTHONPATH=f"{patch}{os.pathsep}{ROOT}",
        # Ray's own check, which knows nothing of such a hang, is to find nothing on a busy machine either.
        RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S="120",
    )
    run.wait_for("epoch 2/2 step 1/5")
    armed.touch()
    run.wait_for("rank 1 on ")
    found = time.time() - hung.stat().st_mtime
    line = run.lines[-1]
    assert re.search(
        r"rank 1 on \S+ \(pid \d+\) hangs: it has been getting its images of epoch 2, step [2-5] for 5 s, "
        r"at pipeline/loader\.py:\d+ in _next; ending its process",
        line,
    ), line
    assert LIMIT_S <= found < LIMIT_S + SLACK_S
    run.wait_for("continuing after epoch 1, step ")
    run.wait_for("epoch 2/2 step ")
    print(f"hang to its line {found:.1f} s, to the next step {time.time() - hung.stat().st_mtime:.1f} s")
    assert run.end() == 0, run.text
    assert run.text.count("failure ") == 1, run.text
    assert "sample ledger: 2 epochs, 10 steps, each with the plan's samples, once" in run.text
    assert_alike(whole, str(tmp_path / "runs" / "run"), shard_set, 2, 2)
