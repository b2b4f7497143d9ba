"""Where the time of a training step goes, what is the limit, what would change it, and what 90 epochs would take.

All of it follows from rates that jobs/benchmark.py measures: each stage is what a chain of stages takes less what the
chain without it takes, with the same threads. Loader and network work side by side, so the slower of the two decides.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from torch import distributed

IMAGENET_IMAGES = 1_281_167  # ILSVRC-2012's training set
PAPER_EPOCHS = 90  # The paper, section 5
COMFORT = 1.1  # A loader less than this much faster than the network will now and then keep it waiting.
LOADER_STAGES = ("read", "decode", "augment", "hand_over")
NETWORK_STAGES = ("forward", "backward", "update")

ADVICE = {
    "read": "keep the set on a faster disk or in memory (/dev/shm)",
    "decode": "give each worker more cores (--threads here, --cpus-per-worker when training)",
    "augment": "give each worker more cores, and leave it memory bandwidth: most of this is writing pixels",
    "hand_over": "use larger micro-batches, and more cores: this process and its decoder threads wait for each other",
    "forward": "more workers, or a faster device; the loader need not change",
    "backward": "more workers, or a faster device; the loader need not change",
    "update": "a larger batch for each worker, since an update costs the same for any batch",
    "all_reduce": "a larger batch for each worker, or a faster network between the machines",
}


@dataclasses.dataclass(frozen=True)
class Rates:
    """Images per second, each the median of the rounds."""

    decode_limit_images_per_s: float
    """libjpeg-turbo decoding the same JPEGs whole, on as many threads."""
    loader_images_per_s: float
    network_images_per_s: float
    train_images_per_s: float
    data_wait: float
    """The fraction of training time spent waiting for the loader."""
    host_us_per_image: float
    """Processor time that the loader takes of the thread that trains, in microseconds."""


@dataclasses.dataclass(frozen=True)
class Chains:
    """Images per second of the chains from which the stages follow."""

    read: float
    """Reading and checking the bytes of the plan's images, by one thread."""
    graph: float
    """The whole graph of DALI, its input in memory."""
    augment: float
    """The same from decoded pixels."""
    forward: float
    """The network's forward pass and loss."""
    gradients: float
    """Forward and backward."""


@dataclasses.dataclass(frozen=True)
class Stages:
    """Milliseconds per batch of one process."""

    read: float
    decode: float
    augment: float
    """Crop, flip, mean and color jitter."""
    hand_over: float
    """What the loader takes beyond its graph: reading that is not hidden behind it, and waiting for each other."""
    forward: float
    backward: float
    update: float
    all_reduce: float | None
    """Between two processes or, at a stated bandwidth, machines; None where neither is known."""

    @classmethod
    def of(cls, rates: Rates, chains: Chains, batch_size: int, all_reduce: float | None) -> Stages:
        """Differences of chains, none below 0 (a chain may be measured a little faster than a part of it)."""
        read, graph, augment, forward, gradients, load, compute = (
            1e3 * batch_size / rate
            for rate in (
                *(chains.read, chains.graph, chains.augment, chains.forward, chains.gradients),
                *(rates.loader_images_per_s, rates.network_images_per_s),
            )
        )
        return cls(
            read=read,
            decode=max(0.0, graph - augment),
            augment=augment,
            hand_over=max(0.0, load - graph),
            forward=forward,
            backward=max(0.0, gradients - forward),
            update=max(0.0, compute - gradients),
            all_reduce=all_reduce,
        )

    def longest(self, names: tuple[str, ...]) -> str:
        """The stage of these that takes most."""
        return max(names, key=lambda name: float(getattr(self, name)))


@dataclasses.dataclass(frozen=True)
class Findings:
    """All that a benchmark found, and what follows from it."""

    rates: Rates
    stages: Stages
    threads: int
    """Of the loader."""
    batch_size: int
    """Images per step of one process."""
    machines: int
    """Processes, one a machine, that the estimate is for."""

    @property
    def exchange_ms(self) -> float:
        """The all-reduce between all machines: in a ring of N, 2 (N - 1) / N of the bytes pass each link."""
        return (
            0.0 if self.stages.all_reduce is None else self.stages.all_reduce * 2 * (self.machines - 1) / self.machines
        )

    @property
    def step_ms(self) -> float:
        """A training step with its exchange, no part of which is hidden behind the backward pass."""
        return 1e3 * self.batch_size / self.rates.train_images_per_s + self.exchange_ms

    @property
    def hours(self) -> float:
        """The paper's 90 epochs of ImageNet."""
        return PAPER_EPOCHS * IMAGENET_IMAGES / (self.batch_size * self.machines) * self.step_ms / 3.6e6

    @property
    def limit(self) -> str:
        """The stage that decides: the longest of the loader, of the network, or the exchange, whichever is slowest."""
        if self.exchange_ms > self.step_ms / 2:
            return "all_reduce"
        return self.stages.longest(NETWORK_STAGES if self.loader_ratio >= COMFORT else LOADER_STAGES)

    @property
    def loader_ratio(self) -> float:
        """How many times the network's images the loader gives."""
        return self.rates.loader_images_per_s / self.rates.network_images_per_s

    @property
    def verdict(self) -> str:
        """What is the limit, in words."""
        limit = self.limit.replace("_", "-")
        if self.limit == "all_reduce":
            share = self.exchange_ms / self.step_ms
            return f"the exchange between machines is the limit: {limit}, {share:.0%} of a step on {self.machines}"
        if self.limit in NETWORK_STAGES:
            return f"the network is the limit: {limit}; the loader could feed {self.loader_ratio:.1f} times as much"
        part = self.rates.loader_images_per_s / self.rates.decode_limit_images_per_s
        return (
            f"the loader is the limit: {limit}, {self.threads} threads; it gives {self.loader_ratio:.0%} of what the "
            f"network takes and {part:.0%} of bare decoding"
        )

    def lines(self) -> list[str]:
        """What a person reads."""
        rates, times = self.rates, dataclasses.asdict(self.stages)
        longest = max(value for value in times.values() if value is not None)
        bars = []
        for name, value in times.items():
            bar = (
                "not measured: give --network-gbit"
                if value is None
                else f"{value:10.1f} {'#' * round(40 * value / longest)}"
            )
            bars.append(f"  {name.replace('_', '-'):27s} {bar}".rstrip())
        return [
            f"  decoding alone (the limit)  {rates.decode_limit_images_per_s:10.1f}",
            f"  loader alone                {rates.loader_images_per_s:10.1f}",
            f"  network alone               {rates.network_images_per_s:10.1f}",
            f"  training                    {rates.train_images_per_s:10.1f}   waiting for data {rates.data_wait:.2%}",
            f"  the loader takes {rates.host_us_per_image:.1f} us an image of the thread that trains",
            f"ms for a batch of {self.batch_size}, each stage by itself; the loader's run beside the network's:",
            *bars,
            self.verdict,
            f"to go faster: {ADVICE[self.limit]}",
            f"the paper's {PAPER_EPOCHS} epochs of ImageNet on {self.machines} such machine(s), "
            f"{self.batch_size * self.machines} images a step: {self.hours:,.1f} hours",
        ]

    def to_json(self) -> dict[str, Any]:
        """The same as data."""
        return {
            **dataclasses.asdict(self.rates),
            "stages_ms": dataclasses.asdict(self.stages),
            "limit": self.limit,
            "verdict": self.verdict,
            "advice": ADVICE[self.limit],
            "threads": self.threads,
            "batch_size": self.batch_size,
            "machines": self.machines,
            "hours_90_epochs": self.hours,
        }


def stated_ms(gradient_bytes: int, gbit_per_s: float) -> float:
    """An all-reduce between two machines at this bandwidth: each sends and receives the bytes once."""
    return 8e3 * gradient_bytes / (gbit_per_s * 1e9)


def measured_ms(gradient_bytes: int, rounds: int) -> float:
    """An all-reduce of so many bytes between two processes of this machine (gloo, loopback), median."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_all_reduce, (folder, gradient_bytes, rounds), nprocs=2)
        return float(Path(folder, "ms").read_text("utf-8"))


def _all_reduce(rank: int, folder: str, gradient_bytes: int, rounds: int) -> None:
    """One of the two; rank 0 writes the median."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    gradients = torch.zeros(gradient_bytes // 4)
    taken = []
    for _ in range(rounds + 1):
        distributed.barrier()
        started = time.perf_counter()
        distributed.all_reduce(gradients)
        taken.append(1e3 * (time.perf_counter() - started))
    if rank == 0:
        middle = float(torch.tensor(taken[1:]).median())  # The first one also connects.
        Path(folder, "ms").write_text(str(middle), "utf-8")
    distributed.destroy_process_group()
