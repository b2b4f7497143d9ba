"""What a loader takes, reads ahead and leaves behind: processes, threads and descriptors."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.dataset.info import read_dataset
from pipeline.dataset.split_reader import SplitReader
from pipeline.loading.graph import PREFETCH
from pipeline.loading.loader import AHEAD, GROUP, READERS, Loader
from pipeline.loading.plan import PlannedBatch, center_crops
from pipeline.loading.reader_process import ReaderProcessError
from tests import ROOT
from tests.processes import below


def new_loader(root: Path) -> Loader:
    info = read_dataset(root)
    return Loader(SplitReader(root, info, "train"), info.rgb, 5, torch.device("cpu"), 1)


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_a_dropped_loader_leaves_no_thread_no_process_and_no_descriptor(shard_set: Path) -> None:
    loader = new_loader(shard_set)
    before, processes, files = threads(), below(os.getpid()), len(os.listdir("/proc/self/fd"))
    gc.disable()  # Dropping must do, without waiting for Python to look for cycles.
    try:
        for runs in range(3):
            loader = new_loader(shard_set)
            for _ in range(runs):
                next(loader.run([center_crops(np.arange(5))] * 2))
    finally:
        gc.enable()
    del loader
    # The kernel counts a thread that was waited for a moment longer.
    deadline = time.monotonic() + 10.0
    while threads() >= before and time.monotonic() < deadline:
        time.sleep(0.01)
    # The first loader is gone, too; those of other tests may end meanwhile.
    assert threads() < before
    assert below(os.getpid()).keys() < processes.keys()
    assert len(os.listdir("/proc/self/fd")) < files


def test_a_reader_process_that_is_killed_is_no_damage_of_data(shard_set: Path) -> None:
    before = below(os.getpid())
    batches = new_loader(shard_set).run(itertools.repeat(center_crops(np.arange(5))))
    next(batches)
    for child in below(os.getpid()).keys() - before:
        os.kill(child, signal.SIGKILL)
    with pytest.raises(ReaderProcessError, match="killed by signal 9"):
        list(itertools.islice(batches, GROUP // 5 * (PREFETCH + AHEAD + 1)))
    assert not issubclass(ReaderProcessError, ValueError)


LOADER_OF_A_SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from pipeline.loading.plan import center_crops
from tests.loading.test_reader_process import new_loader

loader = new_loader(Path(sys.argv[1]))
next(loader.run([center_crops(np.arange(5))]))
print("ready", flush=True)
sys.stdin.read()
"""


def test_readers_end_with_a_process_that_is_killed(shard_set: Path) -> None:
    command = [sys.executable, "-c", LOADER_OF_A_SCRIPT, str(shard_set)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as script:
        assert script.stdout is not None
        assert script.stdout.readline() == b"ready\n"
        readers = below(script.pid)
        assert len(readers) == READERS
        script.kill()
    deadline = time.monotonic() + 30.0
    # Orphans are the first process's.
    while (running := readers.keys() & below(1)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not running


def test_no_more_is_read_ahead_than_is_said(shard_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are planned when they are read, so an endless plan takes no memory."""
    planned: list[int] = []

    def endless() -> Iterator[PlannedBatch]:
        for number in itertools.count():
            planned.append(number)
            yield center_crops(np.arange(5))

    monkeypatch.setattr("pipeline.loading.loader.GROUP", 10)
    for number, _ in enumerate(itertools.islice(new_loader(shard_set).run(endless()), 40), start=1):
        # Of the group that comes next, one batch is known: it did not fit any more.
        assert len(planned) <= 2 * (-(-number // 2) + PREFETCH + AHEAD) + 1
