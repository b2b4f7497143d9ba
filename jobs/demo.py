"""The whole way on this machine: images, shards, two workers, evaluation, report.

Each command is shown before it runs, so that this doubles as a tutorial.

    python jobs/demo.py --output demo
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from jobs.cli.command import run
from jobs.cli.cores import cores
from pipeline.dataset.info import read_dataset
from pipeline.images.synthetic import write_folder

ROOT = Path(__file__).resolve().parent.parent
CLASSES, TRAIN_PER_CLASS, VAL_PER_CLASS = 6, 150, 30  # Of the generated images.
LR = "0.005"  # The paper's 0.01 is for 128 images a step; with 32, it ended higher.


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    output: Path = Path("demo")
    """Where everything goes: images, shards, runs and report."""
    source: Path | None = None
    """Your own images, a folder a class (or train/ and val/ of such); by default some are generated."""
    epochs: int = 6
    """How long to train."""
    batch_size: int = 32
    """Images per step; small, so that minutes on two cores hold enough steps."""
    workers: int = min(2, cores())
    """Processes that train; at most one a core."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")


class CommandError(ValueError):
    """One of the demo's commands failed; it has said why."""


def call(*arguments: str) -> None:
    """Shows a command of jobs/ as a person would type it in the project's environment, and runs it.

    Raises:
        CommandError: if its exit status is not 0.
    """
    print(f"\n$ {shlex.join(['python', *arguments])}", flush=True)
    # In a shell that points at some cluster, the demo still uses this machine.
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        status = process.wait()
    finally:
        # Where a signal ends the demo: training writes a checkpoint, and all commands end their Ray.
        process.terminate()
        process.wait()
    if status != 0:
        raise CommandError(f"`{shlex.join(command)}` failed with exit status {status}; what it said stands above")


def main(config: DemoConfig) -> None:
    # By default it ends this process at once, and the command under way would go on.
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    started = time.perf_counter()
    output = config.output.absolute()
    images = (config.source or output / "images").absolute()
    shards, runs, report = output / "shards", output / "runs", output / "report.html"
    if config.source is None:
        # A line when it is true, into a pipe too.
        write_folder(images, CLASSES, TRAIN_PER_CLASS, VAL_PER_CLASS, 0, functools.partial(print, flush=True))
    call("jobs/shard_imagenet.py", "--source", str(images), "--output", str(shards))
    train = ["--data", str(shards), "--storage", str(runs), "--name", "demo"]
    train += ["--workers", str(config.workers), "--batch-size", str(config.batch_size)]
    train += ["--lr", LR, "--epochs", str(config.epochs), "--seed", "0", "--log-every", "5"]
    call("jobs/train.py", *train)
    evaluate = ["jobs/evaluate.py", "--data", str(shards), "--checkpoint", str(runs / "demo")]
    call(*evaluate)
    call(*evaluate, "--ten-crop")
    shown = ["--storage", str(runs), "--name", "demo", "--data", str(shards), "--output", str(report)]
    call("jobs/report.py", *shown)

    classes = len(read_dataset(shards).classes)
    print(f"\nGuessing among {classes} classes would have {1 - 1 / classes:.1%} top-1 error.")
    print(f"All of it took {(time.perf_counter() - started) / 60:.1f} minutes. Open {report} in a browser.")
    if config.source is None:
        print("Next: your own images, a folder a class: make demo SOURCE=FOLDER DEMO=mine. For ImageNet see README.md.")


if __name__ == "__main__":
    run(DemoConfig, main)
