"""The whole way on this machine: images, shards, two workers through `ray job submit`, evaluation, report.

Each command is shown before it runs, so that this doubles as a tutorial. A Ray cluster of its own is started for it,
on loopback and with token authentication, and ended with it.

    python jobs/demo.py --output demo
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from jobs.cli.command import run
from pipeline.dataset.info import read_dataset

ROOT = Path(__file__).resolve().parent.parent
RAY = str(Path(sys.executable).with_name("ray"))


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    output: Path = Path("demo")
    """Where everything goes: images, shards, runs and report."""
    source: Path | None = None
    """Your own images, a folder a class (or train/ and val/ of such); by default some are generated."""
    epochs: int = 4
    """How long to train."""
    batch_size: int = 32
    """Images per step; small, so that minutes on two cores hold enough steps."""
    workers: int = 2
    """Processes that train."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")


class CommandError(ValueError):
    """One of the demo's commands failed; it has said why."""


def call(arguments: list[str]) -> None:
    """Shows a command, as a person would type it, and runs it from the project's root.

    Raises:
        CommandError: if its exit status is not 0.
    """
    names = {sys.executable: "python", RAY: "ray"}
    print(f"\n$ {shlex.join(names.get(a, a) for a in arguments)}", flush=True)
    status = subprocess.run(arguments, cwd=ROOT, check=False).returncode
    if status != 0:
        raise CommandError(f"`{shlex.join(arguments)}` failed with exit status {status}; what it said stands above")


@contextlib.contextmanager
def ray_with_dashboard(cpus: int) -> Iterator[str]:
    """Starts Ray on loopback, with a dashboard that takes jobs; gives its address, and ends Ray with the context."""
    # Only now: Ray reads the token's variables when it is imported.
    import ray

    from jobs.cluster.connection import LOOPBACK_INTERFACE, LOOPBACK_SWITCH
    from jobs.cluster.ray_private import local_start

    os.environ.update(LOOPBACK_SWITCH | LOOPBACK_INTERFACE)
    with local_start():
        context = ray.init("local", num_cpus=cpus, include_dashboard=True, logging_level=logging.WARNING)
    try:
        yield f"http://{context.dashboard_url}"
    finally:
        ray.shutdown()


def main(config: DemoConfig) -> None:
    started = time.perf_counter()
    output = config.output.absolute()
    python = sys.executable
    images = (config.source or output / "images").absolute()
    shards, runs, report = output / "shards", output / "runs", output / "report.html"
    # The token mode is explicit on both sides: Ray turns it on by itself for some clusters, and then refuses a client
    # that was not told. The token is this cluster's alone. A job's `python` is the one that the cluster finds first.
    path = f"{Path(python).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "PATH": path})
    os.environ.pop("RAY_ADDRESS", None)
    if config.source is None:
        call([python, "jobs/generate_images.py", "--output", str(images)])
    call([python, "jobs/shard_imagenet.py", "--source", str(images), "--output", str(shards)])
    with ray_with_dashboard(max(os.cpu_count() or 1, config.workers)) as address:
        train = ["python", "jobs/train.py", "--data", str(shards), "--storage", str(runs), "--name", "demo"]
        train += ["--workers", str(config.workers), "--batch-size", str(config.batch_size)]
        train += ["--epochs", str(config.epochs), "--log-every", "5"]
        call([RAY, "job", "submit", "--address", address, "--working-dir", ".", "--", *train])

    evaluate = [python, "jobs/evaluate.py", "--data", str(shards), "--checkpoint", str(runs / "demo")]
    call(evaluate)
    call([*evaluate, "--ten-crop"])
    call([python, "jobs/report.py", "--storage", str(runs), "--name", "demo", "--output", str(report)])

    classes = len(read_dataset(shards).classes)
    print(f"\nGuessing among {classes} classes would have {1 - 1 / classes:.1%} top-1 error.")
    print(f"Report: {report}. All of it took {(time.perf_counter() - started) / 60:.1f} minutes.")


if __name__ == "__main__":
    run(DemoConfig, main)
