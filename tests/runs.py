"""Real runs of jobs/train.py as a test starts, follows and disturbs them, and what must come of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from pyarrow import fs as arrow_fs
from safetensors.torch import load_file

from jobs.training import checkpoint
from pipeline.dataset.info import read_dataset
from pipeline.loading.plan import Plan, color_matrix
from pipeline.storage.locations import open_location
from tests import ROOT
from tests.observer import assert_trained_once
from tests.processes import below, outside_clusters

BATCH = 9
RUN_SECONDS = 600.0  # A run that has not ended by then hangs.
STEPS = 5  # Of an epoch: 45 images, 9 at a time


class Followed:
    """A process in a session of its own, with a pipe for its output, and what it prints while it goes on."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        # What reads its lines then comes to their end.
        self._overdue = threading.Timer(RUN_SECONDS, os.killpg, (process.pid, signal.SIGKILL))
        self._overdue.daemon = True
        self._overdue.start()

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def wait_for(self, part: str) -> None:
        """Reads until a line holds `part`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if part in line:
                return
        pytest.fail(f"{part!r} was never printed:\n{self.text}")

    def end(self) -> int:
        """Reads to the end; the exit status."""
        assert self.process.stdout is not None
        self.lines += self.process.stdout
        self._overdue.cancel()
        return self.process.wait(60)


def command(
    shards: Path, storage: str, workers: int | str, epochs: int, *more: object, notes: Path | None = None
) -> list[str]:
    """What is given to Python to train a run of the name "run", with `tests.observer` if there is a file for it."""
    arguments = ["--data", shards, "--storage", storage, "--name", "run", "--workers", workers, "--epochs", epochs]
    arguments += ["--batch-size", BATCH, "--log-every", 1, "--no-gpus"]
    program = ["jobs/train.py"] if notes is None else [ROOT / "tests" / "observer.py", notes]
    return [*map(str, [*program, *arguments, *more])]


class Run(Followed):
    """One start of jobs/train.py, and what it prints while it goes on."""

    def __init__(
        self,
        shards: Path,
        storage: str,
        workers: int | str,
        epochs: int,
        *more: object,
        checkpoint_every: int = 2,
        notes: Path | None = None,
        **environment: str,
    ) -> None:
        more = (*more, "--checkpoint-every", checkpoint_every)
        process = subprocess.Popen(
            [sys.executable, *command(shards, storage, workers, epochs, *more, notes=notes)],
            cwd=ROOT,
            env=outside_clusters() | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        super().__init__(process)

    def worker(self) -> int:
        """The process id of one of the run's workers."""
        return next(pid for pid, line in below(self.process.pid).items() if line.startswith("ray::RayTrainWorker"))


def undisturbed(shards: Path, folder: Path, workers: int, epochs: int) -> Path:
    run = Run(shards, str(folder), workers, epochs, checkpoint_every=0)
    assert run.end() == 0, run.text
    return folder / "run"


def plan(shards: Path) -> Plan:
    info = read_dataset(shards)
    return Plan(info.splits["train"].samples, BATCH, 0, color_matrix(info.rgb))


def assert_alike(whole: Path, run: str, shards: Path, epochs: int, workers: int, notes: Path) -> None:
    """The run at a path or URL ended as the undisturbed one did, bit for bit, and saw each image once an epoch."""
    filesystem, path = open_location(run)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("model.safetensors", "optimizer.safetensors"):
            inside = f"checkpoint_{epochs:04d}_000000/{name}"
            arrow_fs.copy_files(f"{path}/{inside}", f"{folder}/{name}", source_filesystem=filesystem)
            a, b = load_file(whole / inside), load_file(f"{folder}/{name}")
            assert a.keys() == b.keys()
            assert all(a[key].equal(b[key]) for key in a)
    assert assert_trained_once(notes, plan(shards), epochs * STEPS) == [workers]


def tracebacks(lines: list[str]) -> list[str]:
    """Those that a run printed, but for the controller's, which may complain of a busy machine."""
    return [line for line in lines if "Traceback" in line and "TrainController" not in line]


def last(run: str) -> tuple[int, int]:
    progress = list(checkpoint.committed(run).values())[-1].progress
    return progress.epoch, progress.step
