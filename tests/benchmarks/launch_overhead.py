"""What Ray Train costs beside torchrun, with the same training loop on the same cores, turn and turn about.

    python -m tests.benchmarks.launch_overhead --data SHARDS --work FOLDER

`jobs/train.py` with all that it does besides (exchanges between the workers, events, printing through Ray), and
torchrun with the loop alone: both train the network with gloo workers of one core each. Every step is timed by its
worker. After some steps one worker is killed, and both start all workers anew, with no checkpoint to read. The goal is
0.99 of torchrun's images/s. Few images a step make the overhead look its worst.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jobs.cli.command import run
from pipeline.dataset.info import read_dataset, write_json
from tests.benchmarks.contest import check_least
from tests.processes import below, outside_clusters

ROOT = Path(__file__).resolve().parents[2]
GOAL = 0.99
RAY, TORCHRUN = "Ray Train", "torchrun"
SETTLED = 3  # Steps that do not count: the first allocate.
TURN_SECONDS = 300.0  # A turn that takes longer hangs.
RECOVERY_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class OverheadConfig:
    data: Path
    """A shard set with at least as many training images as the steps take."""
    work: Path
    """A folder to write runs to."""
    batch_size: int = 8
    """Images per step over all workers."""
    steps: int = 25
    """Steps of a turn, the first three of which do not count."""
    rounds: int = 3
    """Each has so many turns."""
    workers: int = 2
    """Of one core each. With fewer than there are cores, Ray's own processes have room, as they do on a cluster."""
    json: Path | None = None
    """Also write every turn's figures to this file."""

    def __post_init__(self) -> None:
        check_least(self, "rounds", "workers")
        check_least(self, "batch_size", least=self.workers)
        check_least(self, "steps", least=SETTLED + 1)


class Turn(NamedTuple):
    """What one start showed."""

    images_per_s: float
    first_step_s: float
    """From the command to the end of the first step."""
    recovery_s: float | None
    """From a worker's death to the end of the next step; None if there was none within RECOVERY_SECONDS."""


def ray_command(config: OverheadConfig, number: int) -> list[str]:
    storage = config.work / f"runs-{os.getpid()}-{number}"
    options = ["--data", config.data, "--storage", storage, "--name", "overhead", "--batch-size", config.batch_size]
    options += ["--workers", config.workers, "--cpus-per-worker", 1, "--no-gpus", "--epochs", 1, "--log-every", 1]
    return [sys.executable, "jobs/train.py", *map(str, options)]


def torchrun_command(config: OverheadConfig, number: int) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", "3"]
    launch += ["--nproc-per-node", str(config.workers)]
    rank = ["-m", "tests.benchmarks.torchrun_rank", "--data", str(config.data), "--batch-size", str(config.batch_size)]
    return [sys.executable, *launch, *rank]


def measure(command: list[str], is_worker: Callable[[str], bool], steps: int) -> Turn:
    """Starts a command, lets it train, kills one of its workers, and waits for the step after.

    Raises:
        ValueError: if it ends before.
    """
    clean = outside_clusters()
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        # torchrun's own store keeps the dead ranks' addresses, and the next ones may wait for them for ever.
        env={**clean, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    overdue = threading.Timer(TURN_SECONDS, _end, (process,))
    overdue.start()
    try:
        _wait(process, 1)
        first = time.monotonic() - started
        rates = [_wait(process, step) for step in range(2, steps + 1)][SETTLED - 1 :]
        worker = next(pid for pid, line in below(process.pid).items() if is_worker(line))
        os.kill(worker, signal.SIGKILL)
        recovery = _recovery(process)
    finally:
        overdue.cancel()
        _end(process)
        process.wait()
    # All steps have the same images.
    return Turn(statistics.harmonic_mean(rates), first, recovery)


def _recovery(process: subprocess.Popen[str]) -> float | None:
    """Seconds until the first step happens again; None if it does not in time."""
    started = time.monotonic()
    overdue = threading.Timer(RECOVERY_SECONDS, _end, (process,))
    overdue.start()
    try:
        _wait(process, 1)
    except ValueError:
        return None
    finally:
        overdue.cancel()
    return time.monotonic() - started


def _end(process: subprocess.Popen[str]) -> None:
    """Kills a process and all below it; torchrun's ranks have sessions of their own."""
    for pid in (process.pid, *below(process.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _wait(process: subprocess.Popen[str], step: int) -> float:
    """Reads to the line of a step; its images/s."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        found = re.search(rf" step {step}/\d+: .*?([\d.]+) images/s", line)
        if found is not None:
            return float(found[1])
    raise ValueError(f"it ended before step {step}: {''.join(seen[-5:])}")


def table(turns: dict[str, list[Turn]]) -> list[str]:
    """Markdown: each contender's medians."""
    rows = [
        "| launcher | images/s | command to first step | worker's death to next step |",
        "| --- | --- | --- | --- |",
    ]
    for name, values in turns.items():
        rate = statistics.median(turn.images_per_s for turn in values)
        first = statistics.median(turn.first_step_s for turn in values)
        back = [turn.recovery_s for turn in values if turn.recovery_s is not None]
        recovery = f"{statistics.median(back):.1f} s" if back else "none"
        hung = f" ({len(values) - len(back)} of {len(values)} hung)" if len(back) < len(values) else ""
        rows.append(f"| {name} | {rate:.2f} | {first:.1f} s | {recovery}{hung} |")
    return rows


def main(config: OverheadConfig) -> None:
    available = read_dataset(config.data).splits["train"].samples
    if available < config.steps * config.batch_size:
        raise ValueError(f"the set has {available} training images, too few for --steps {config.steps}")
    # So that a turn that is under way takes its processes along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    contenders = {
        RAY: (ray_command, lambda line: line.startswith("ray::RayTrainWorker")),
        TORCHRUN: (torchrun_command, lambda line: "torchrun_rank" in line and "torch.distributed.run" not in line),
    }
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    for number in range(config.rounds):
        order = list(contenders)[:: 1 if number % 2 == 0 else -1]
        for name in order:
            command, is_worker = contenders[name]
            turns[name].append(measure(command(config, number), is_worker, config.steps))
            print(f"round {number + 1}, {name}: {turns[name][-1]}", flush=True)
    ratios = [ours.images_per_s / theirs.images_per_s for ours, theirs in zip(*turns.values(), strict=True)]
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} core(s)"
    print(f"{machine}, {config.workers} worker(s), batch {config.batch_size}, medians of {config.rounds} rounds:")
    for row in table(turns):
        print(row)
    ratio = statistics.median(ratios)
    print(
        f"{RAY} by {TORCHRUN}: {ratio:.3f} ({min(ratios):.3f} to {max(ratios):.3f}); the goal of {GOAL} is "
        f"{'met' if ratio >= GOAL else 'not met'}"
    )
    if config.json is not None:
        write_json(config.json, {name: [turn._asdict() for turn in values] for name, values in turns.items()})


if __name__ == "__main__":
    run(OverheadConfig, main)
