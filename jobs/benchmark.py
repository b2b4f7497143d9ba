"""How fast this machine feeds and trains AlexNet, and which of the two is the limit.

Four rates over the same shard set, in one run: decoding its JPEGs whole and nothing else (the limit), the loader alone,
the network alone on a batch that stays where it is, and both together.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torchvision.io import decode_jpeg

from jobs.checkpoint import Identity
from jobs.cli import run
from jobs.device import choose_device
from jobs.worker import make_network
from model.recipe import RECIPES
from model.training import Trainer, Worker
from pipeline.dataset import SplitReader, read_dataset, write_json
from pipeline.loader import Loader
from pipeline.plan import Plan, colour_matrix

IMAGENET_IMAGES = 1_281_167  # ILSVRC-2012's training set
PAPER_EPOCHS = 90  # The paper, section 5
COMFORT = 1.1  # A loader less than this much faster than the network will now and then keep it waiting.


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    data: Path
    """A shard set, on the disk that training will read from."""
    json: Path | None = None
    """Also write the rates to this file."""
    batch_size: int = 128
    """Images per step of this one process."""
    gpu: bool = dataclasses.field(default_factory=torch.cuda.is_available)
    """Measure a GPU; by default, if torch sees one."""
    threads: int = os.cpu_count() or 1
    """Decoder threads, and the network's threads on CPU."""
    rounds: int = 3
    """Each rate is measured so often; the median counts."""
    steps: int = 8
    """Training steps in a round; loader and decoder go through four times as many batches."""
    machines: int = 1
    """Estimate the paper's 90 epochs for so many of these."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "threads", "rounds", "steps", "machines"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")


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

    @property
    def verdict(self) -> str:
        """Which part is the limit, in words."""
        ratio = self.loader_images_per_s / self.network_images_per_s
        if ratio >= COMFORT:
            return f"the network is the limit: the loader could feed {ratio:.1f} times as much"
        part = self.loader_images_per_s / self.decode_limit_images_per_s
        return (
            f"the loader is the limit, at {ratio:.0%} of what the network takes and {part:.0%} of bare decoding on "
            "as many threads: give it more cores"
        )


def rate(images: int, action: Callable[[], object], settle: Callable[[], None]) -> float:
    """Images per second of an action that deals with so many."""
    settle()
    started = time.perf_counter()
    action()
    settle()
    return images / (time.perf_counter() - started)


def measure(config: BenchmarkConfig) -> Rates:
    """Runs the four, turn and turn about, so that a machine that slows down slows all of them."""
    info = read_dataset(config.data)
    reader = SplitReader(config.data, info, "train")
    recipe = dataclasses.replace(RECIPES["default"], batch_size=config.batch_size)
    plan = Plan(len(reader), config.batch_size, recipe.seed, colour_matrix(info.rgb, recipe.colour))
    device = choose_device(config.gpu)
    torch.set_num_threads(config.threads)
    network = make_network(Identity.of(recipe, info))
    worker = Worker(0, 1, device, torch.bfloat16 if config.gpu else torch.float32)
    trainer = Trainer(network.to(memory_format=torch.channels_last).to(device), recipe, worker)
    network.train()
    loader = Loader(reader, info.rgb, config.batch_size, device, config.threads)
    batches = (batch for epoch in itertools.count() for batch in loader.run(plan.epoch(epoch)))
    resident = next(batches)
    trainer.step([resident])
    settle = torch.cuda.synchronize if config.gpu else _nothing
    trained, loaded = config.steps * config.batch_size, 4 * config.steps * config.batch_size
    encoded = [torch.from_numpy(reader.image(i % len(reader)).copy()) for i in range(loaded)]
    waits: list[float] = []

    def decode() -> None:
        with concurrent.futures.ThreadPoolExecutor(config.threads) as pool:
            for _ in pool.map(decode_jpeg, encoded):
                pass

    def load() -> None:
        for _ in itertools.islice(batches, 4 * config.steps):
            pass

    def train() -> None:
        for _ in range(config.steps):
            asked = time.perf_counter()
            batch = next(batches)
            waits.append(time.perf_counter() - asked)
            trainer.step([batch])

    def compute() -> None:
        for _ in range(config.steps):
            trainer.step([resident])

    jobs = {
        "decode": (loaded, decode),
        "load": (loaded, load),
        "train": (trained, train),
        "compute": (trained, compute),
    }
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(1, config.rounds + 1):
        for name, (images, action) in jobs.items():
            found[name].append(rate(images, action, settle))
        print(
            f"round {number} of {config.rounds}: " + ", ".join(f"{n} {v[-1]:.1f}" for n, v in found.items()), flush=True
        )
    middle = {name: statistics.median(values) for name, values in found.items()}
    seconds = trained * config.rounds / middle["train"]
    return Rates(middle["decode"], middle["load"], middle["compute"], middle["train"], sum(waits) / seconds)


def _nothing() -> None:
    """On CPU, an action is over when it returns."""


def main(config: BenchmarkConfig) -> None:
    rates = measure(config)
    name = torch.cuda.get_device_name(0) if config.gpu else platform.processor() or platform.machine()
    print(f"{name}, {config.threads} thread(s), batch {config.batch_size}; images/s, medians of {config.rounds}:")
    print(f"  decoding alone (the limit)  {rates.decode_limit_images_per_s:10.1f}")
    print(f"  loader alone                {rates.loader_images_per_s:10.1f}")
    print(f"  network alone               {rates.network_images_per_s:10.1f}")
    print(f"  training                    {rates.train_images_per_s:10.1f}   waiting for data {rates.data_wait:.2%}")
    hours = PAPER_EPOCHS * IMAGENET_IMAGES / (rates.train_images_per_s * config.machines) / 3600
    print(rates.verdict)
    print(f"90 epochs of ImageNet on {config.machines} such process(es), if they share perfectly: {hours:,.1f} hours")
    if config.json is not None:
        write_json(config.json, {**dataclasses.asdict(rates), "verdict": rates.verdict, "hours_90_epochs": hours})


if __name__ == "__main__":
    run(BenchmarkConfig, main)
