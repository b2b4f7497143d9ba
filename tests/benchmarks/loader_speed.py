"""How fast training batches come out of the same JPEGs: this loader, libjpeg-turbo alone, and other loaders.

    python -m tests.benchmarks.loader_speed --data SHARDS --work FOLDER

Every loader that is installed runs in a process of its own, turn and turn about, on one core and on two, with as many
threads or worker processes; what each reads is made first, once. Rates are of the steady state, and ratios are to
libjpeg-turbo decoding the same JPEGs whole. A loader that fails, or takes longer than three minutes (ten to make what
it reads), is left out and named. The other loaders, best in an environment of their own:

    pip install -e .[bench]
"""

from __future__ import annotations

import dataclasses
import functools
import json
import platform
import shutil
from pathlib import Path

from jobs.cli.command import run
from pipeline.dataset.info import read_dataset, write_json
from tests.benchmarks.contest import check_cores, check_least, present, run_pinned, table, take_turns
from tests.benchmarks.loader_peers import PEERS, installed

LIMIT = next(iter(PEERS))
TIME_OUT_S = 180
PREPARE_S = 600


@dataclasses.dataclass(frozen=True)
class SpeedConfig:
    data: Path
    """A shard set on a local disk; 3,000 training images or more."""
    work: Path
    """Folder for what the loaders read; about 0.6 MB an image, most of it decoded pixels."""
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
        check_least(self, "cores", "rounds")
        check_least(self, "seconds", least=0.1)
        if unknown := set(self.loaders) - set(PEERS):
            raise ValueError(f"--loaders {', '.join(sorted(unknown))} must be among {', '.join(PEERS)}")


def call(name: str, config: SpeedConfig, cores: int, time_out_s: float, *options: str) -> list[str]:
    """Runs one loader pinned to so many cores; the lines it printed.

    Raises:
        ValueError: if it fails or does not end.
    """
    arguments = ["-m", "tests.benchmarks.loader_peers", "--name", name, "--data", str(config.data)]
    arguments += ["--work", str(config.work), "--cores", str(cores), *options]
    return run_pinned(name, arguments, cores, time_out_s)


def rate(config: SpeedConfig, name: str, cores: int) -> float:
    """Images per second of one run of one loader, in the steady state."""
    printed = call(name, config, cores, TIME_OUT_S, "--seconds", str(config.seconds))
    return float(json.loads(printed[-1])["images_per_s"])


def main(config: SpeedConfig) -> None:
    check_cores(config.cores)
    config = dataclasses.replace(config, data=config.data.resolve(), work=config.work.resolve())
    split = read_dataset(config.data).splits["train"]
    config.work.mkdir(parents=True, exist_ok=True)
    ready = []
    for name in present(config.loaders, installed):
        for left in config.work.glob("part-*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            # What it reads, made on all cores.
            call(name, config, max(config.cores), PREPARE_S, "--prepare")
        except ValueError as error:
            print(f"left out, nothing to read: {error}", flush=True)
        else:
            ready.append(name)
    rates = take_turns(ready, config.cores, config.rounds, functools.partial(rate, config))
    size = split.bytes / split.samples / 1000
    print(f"\n{platform.machine()}, {split.samples} images of {size:.0f} KB, medians of {config.rounds}")
    for row in table(rates, config.cores, "loader", LIMIT, "limit"):
        print(row)
    if config.json is not None:
        write_json(config.json, rates)


if __name__ == "__main__":
    run(SpeedConfig, main)
