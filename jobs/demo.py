"""The whole way on this machine: images, shards, two workers through `ray job submit`, evaluation, report.

Each command is shown before it runs, so that this doubles as a tutorial. A Ray cluster of its own is started for it,
on loopback and with token authentication, and ended with it.

    python jobs/demo.py --output demo
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from jobs.cli.command import run
from jobs.cli.cores import cores
from pipeline.dataset.info import read_dataset
from pipeline.images.synthetic import write_folder

ROOT = Path(__file__).resolve().parent.parent
RAY = str(Path(sys.executable).with_name("ray"))
HOST = "127.0.0.1"
START_SECONDS, STOP_SECONDS = 90, 20
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
    workers: int = 2
    """Processes that train."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")


class CommandError(ValueError):
    """One of the demo's commands failed; it has said why."""


def call(arguments: list[str], environment: dict[str, str]) -> None:
    """Shows a command and runs it from the project's root.

    Raises:
        CommandError: if its exit status is not 0.
    """
    show(arguments)
    status = subprocess.run(arguments, cwd=ROOT, env=environment, check=False).returncode
    if status != 0:
        raise CommandError(f"`{shlex.join(arguments)}` failed with exit status {status}; what it said stands above")


def show(arguments: list[str]) -> None:
    """Prints a command as a person would type it in the project's environment."""
    names = {sys.executable: "python", RAY: "ray"}
    print(f"\n$ {shlex.join(names.get(a, a) for a in arguments)}", flush=True)


@contextlib.contextmanager
def ray_cluster(environment: dict[str, str], cpus: int) -> Iterator[str]:
    """Starts a one-node Ray cluster on loopback; gives the dashboard's address and ends the cluster afterwards.

    Raises:
        CommandError: if it does not come up.
    """
    port, dashboard, client, agent = free_ports(4)
    with tempfile.TemporaryFile("w+") as log:
        command = [RAY, "start", "--head", "--block", "--disable-usage-stats"]
        command += [f"--node-ip-address={HOST}", f"--port={port}", f"--num-cpus={cpus}"]
        command += [f"--dashboard-host={HOST}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
        # Another Ray has the agent's usual port; without one, an agent takes no jobs.
        command += [f"--dashboard-agent-listen-port={agent}"]
        show([*command, "&"])
        # A session of its own: all that it starts is ended with it, and no other Ray on this machine.
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            wait_for_dashboard(process, dashboard)
            yield f"http://{HOST}:{dashboard}"
        except CommandError:
            log.seek(0)
            sys.stderr.write(log.read())
            raise
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in sockets]


def wait_for_dashboard(process: subprocess.Popen[bytes], port: int) -> None:
    """Returns when the dashboard accepts connections; raises CommandError if it never does."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex((HOST, port)) == 0:
                return
        time.sleep(0.2)
    raise CommandError("the local Ray cluster did not start; what it said stands above")


def main(config: DemoConfig) -> None:
    # By default it ends a process at once, and its Ray would stay.
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    started = time.perf_counter()
    output = config.output.absolute()
    python = sys.executable
    images = (config.source or output / "images").absolute()
    shards, runs, report = output / "shards", output / "runs", output / "report.html"
    # The token mode is explicit on both sides: Ray turns it on by itself for some clusters, and then refuses a client
    # that was not told. The token is this cluster's alone. A job's `python` is the one that the cluster finds first.
    path = f"{Path(python).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "PATH": path}
    environment.pop("RAY_ADDRESS", None)
    # .rayignore says what a job takes along; Ray would warn of each folder that it leaves out by default.
    environment["RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES"] = "__pycache__"
    if config.source is None:
        # A line when it is true, into a pipe too.
        write_folder(images, CLASSES, TRAIN_PER_CLASS, VAL_PER_CLASS, 0, functools.partial(print, flush=True))
    call([python, "jobs/shard_imagenet.py", "--source", str(images), "--output", str(shards)], environment)
    with ray_cluster(environment, max(cores(), config.workers)) as address:
        train = ["python", "jobs/train.py", "--data", str(shards), "--storage", str(runs), "--name", "demo"]
        train += ["--workers", str(config.workers), "--batch-size", str(config.batch_size)]
        train += ["--lr", LR, "--epochs", str(config.epochs), "--seed", "0", "--log-every", "5"]
        call([RAY, "job", "submit", "--address", address, "--working-dir", ".", "--", *train], environment)

    evaluate = [python, "jobs/evaluate.py", "--data", str(shards), "--checkpoint", str(runs / "demo")]
    call(evaluate, environment)
    call([*evaluate, "--ten-crop"], environment)
    shown = ["--storage", str(runs), "--name", "demo", "--data", str(shards), "--output", str(report)]
    call([python, "jobs/report.py", *shown], environment)

    classes = len(read_dataset(shards).classes)
    print(f"\nGuessing among {classes} classes would have {1 - 1 / classes:.1%} top-1 error.")
    print(f"All of it took {(time.perf_counter() - started) / 60:.1f} minutes. Open {report} in a browser.")
    if config.source is None:
        print("Next: your own images, a folder a class: make demo SOURCE=FOLDER DEMO=mine. For ImageNet see README.md.")


if __name__ == "__main__":
    run(DemoConfig, main)
