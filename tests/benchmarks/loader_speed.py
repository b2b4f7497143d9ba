"""How fast training batches come out of the same JPEGs: this loader, libjpeg-turbo alone, and other loaders.

    python -m tests.benchmarks.loader_speed --data SHARDS --work FOLDER

Every loader that is installed runs in a process of its own, turn and turn about, on one core and on two, with as many
threads or worker processes; what each reads is made first, once. Rates are of the steady state, and ratios are to
libjpeg-turbo decoding the same JPEGs whole. A loader that fails, or takes longer than three minutes, is left out and
named. The other loaders, best in an environment of their own:

    pip install -e .[bench]
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path

from jobs.cli import run
from pipeline.dataset import read_dataset, write_json
from tests.benchmarks.loader_peers import PEERS, installed

LIMIT = next(iter(PEERS))
TIME_OUT_S = 180


@dataclasses.dataclass(frozen=True)
class SpeedConfig:
    data: Path
    """A shard set on a local disk; 3,000 training images or more."""
    work: Path
    """Folder for what the loaders read; about 1 MB an image, most of it ffcv's pixels."""
    cores: tuple[int, ...] = (1, 2)
    """Measure on so many cores, each."""
    rounds: int = 3
    """Each loader is measured so often; the median counts."""
    seconds: float = 6.0
    """Each measurement takes at least so long."""
    loaders: tuple[str, ...] = tuple(PEERS)
    """Which loaders."""
    json: Path | None = None
    """Also write the rates to this file."""

    def __post_init__(self) -> None:
        if unknown := set(self.loaders) - set(PEERS):
            raise ValueError(f"--loaders {', '.join(sorted(unknown))} must be among {', '.join(PEERS)}")
        if self.rounds < 1 or not self.seconds > 0:
            raise ValueError("--rounds and --seconds must be above 0")


def call(name: str, config: SpeedConfig, cores: int, *options: str) -> list[str]:
    """Runs one loader pinned to so many cores; the lines it printed.

    Raises:
        ValueError: if it fails or does not end.
    """
    allowed = ",".join(map(str, sorted(os.sched_getaffinity(0))[:cores]))
    command = ["taskset", "-c", allowed, sys.executable, "-m", "tests.benchmarks.loader_peers", "--name", name]
    process = subprocess.Popen(
        [*command, "--data", str(config.data), "--work", str(config.work), "--cores", str(cores), *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        printed, errors = process.communicate(timeout=TIME_OUT_S)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{name} did not end within {TIME_OUT_S} s") from None
    finally:
        # Its worker processes too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise ValueError(f"{name} failed: {(errors.strip().splitlines() or ['nothing said'])[-1]}")
    return printed.splitlines()


def prepare(name: str, config: SpeedConfig) -> None:
    """Makes what one loader reads, on all cores."""
    for left in config.work.glob("part-*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    call(name, config, max(config.cores), "--prepare")


def main(config: SpeedConfig) -> None:
    if len(os.sched_getaffinity(0)) < max(config.cores):
        raise ValueError(f"--cores {max(config.cores)}: this process may use {len(os.sched_getaffinity(0))}")
    config = dataclasses.replace(config, data=config.data.resolve(), work=config.work.resolve())
    split = read_dataset(config.data).splits["train"]
    config.work.mkdir(parents=True, exist_ok=True)
    loaders = [name for name in config.loaders if installed(name)]
    if missing := [name for name in config.loaders if name not in loaders]:
        print(f"not installed: {', '.join(missing)}", flush=True)
    found: dict[str, dict[int, list[float]]] = {}
    for name in loaders:
        try:
            prepare(name, config)
        except ValueError as error:
            print(f"left out, nothing to read: {error}", flush=True)
        else:
            found[name] = {cores: [] for cores in config.cores}
    for number in range(config.rounds):
        for cores in config.cores:
            for name in list(found):
                try:
                    printed = call(name, config, cores, "--seconds", str(config.seconds))
                except ValueError as error:
                    print(f"left out: {error}", flush=True)
                    del found[name]
                    continue
                rate = float(json.loads(printed[-1])["images_per_s"])
                found[name][cores].append(rate)
                print(f"round {number + 1}, {cores} core(s), {name}: {rate:,.0f} images/s", flush=True)
    rates = {name: {c: statistics.median(values) for c, values in by.items()} for name, by in found.items()}
    size = split.bytes / split.samples / 1000
    print(f"\n{platform.machine()}, {split.samples} images of {size:.0f} KB, medians of {config.rounds}")
    for row in table(rates, config.cores):
        print(row)
    if config.json is not None:
        write_json(config.json, rates)


def table(rates: dict[str, dict[int, float]], cores: tuple[int, ...]) -> list[str]:
    """Markdown: images/s and the ratio to the limit, for each number of cores."""
    rows = ["| loader | " + " | ".join(f"{c} core(s): images/s | of the limit" for c in cores) + " |"]
    rows.append("| --- " * (2 * len(cores) + 1) + "|")
    for name, by in rates.items():
        cells = []
        for c in cores:
            limit = rates.get(LIMIT, {}).get(c)
            cells += [f"{by[c]:,.0f}", f"{by[c] / limit:.2f}" if limit else ""]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


if __name__ == "__main__":
    run(SpeedConfig, main)
