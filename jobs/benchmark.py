"""How fast this machine feeds and trains AlexNet, stage by stage, and what is the limit.

Four rates over the same shard set, in one run: decoding its JPEGs whole and nothing else (the limit), the loader alone,
the network alone on a batch that stays where it is, and both together; then each stage's part of the time.

With --check-gpu: first compares the GPU's loader with the CPU's (`make gpu` is the whole command).
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline
from nvidia.dali import __version__ as dali_version
from torch.nn import functional as F
from torchvision.io import decode_jpeg

from jobs import gpu_check, stages
from jobs.checkpoint import Identity
from jobs.cli import run
from jobs.device import choose_device, processor
from jobs.stages import Chains, Findings, Rates, Stages
from jobs.worker import make_network
from model.recipe import RECIPES
from model.training import Trainer, Worker
from pipeline.dataset import DatasetInfo, read_dataset, write_json
from pipeline.graph import GpuDecoder, define
from pipeline.loader import Loader
from pipeline.plan import Plan, colour_matrix
from pipeline.split_reader import SplitReader


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    data: Path
    """A shard set, on the disk that training will read from."""
    json: Path | None = None
    """Also write the figures to this file."""
    check_gpu: bool = False
    """First check the GPU's batches against the CPU's, and memory over 1,000 batches."""
    gpu_decoder: GpuDecoder = "cuda"
    """What decodes JPEGs on a GPU, as in jobs/train.py."""
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
    """Estimate the paper's 90 epochs for so many of these, one process each."""
    network_gbit: float | None = None
    """Bandwidth between the machines, in Gbit/s; by default, on CPU, what two processes of this machine reach."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "threads", "rounds", "steps", "machines"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.network_gbit is not None and not self.network_gbit > 0:
            raise ValueError(f"--network-gbit is {self.network_gbit}; it must be above 0")


def rate(images: int, action: Callable[[], object], settle: Callable[[], None]) -> float:
    """Images per second of an action that deals with so many."""
    settle()
    started = time.perf_counter()
    action()
    settle()
    return images / (time.perf_counter() - started)


def measure(config: BenchmarkConfig) -> Findings:
    """Runs all chains in turn, so that a machine that slows down slows all of them."""
    info = read_dataset(config.data)
    reader = SplitReader(config.data, info, "train")
    recipe = dataclasses.replace(RECIPES["default"], batch_size=config.batch_size)
    plan = Plan(len(reader), config.batch_size, recipe.seed, colour_matrix(info.rgb, recipe.colour))
    device = choose_device(config.gpu)
    torch.set_num_threads(config.threads)
    network = make_network(Identity.of(recipe, info)).to(memory_format=torch.channels_last).to(device)
    precision = torch.bfloat16 if config.gpu else torch.float32
    trainer = Trainer(network, recipe, Worker(0, 1, device, precision))
    network.train()
    loader = Loader(reader, info.rgb, config.batch_size, device, config.threads, gpu_decoder=config.gpu_decoder)
    batches = loader.run(plan.endless())
    resident = next(batches)
    trainer.step([resident])
    settle = torch.cuda.synchronize if config.gpu else _nothing
    many = 4 * config.steps
    to_read = list(itertools.islice(plan.endless(), many))
    encoded = [torch.from_numpy(reader.image(i % len(reader)).copy()) for i in range(many * config.batch_size)]
    graph = bare_graph(config, reader.read(to_read[0].samples), info)
    decoded = np.stack([reader.decoded(sample) for sample in to_read[0].samples.tolist()])
    cropping = bare_graph(config, decoded, info)
    waits: list[float] = []
    host: list[float] = []

    def decode() -> None:
        with concurrent.futures.ThreadPoolExecutor(config.threads) as pool:
            for _ in pool.map(decode_jpeg, encoded):
                pass

    def read() -> None:
        for planned in to_read:
            reader.read(planned.samples)

    def run_graph() -> None:
        for _ in range(many):
            graph.run()

    def augment() -> None:
        for _ in range(many):
            cropping.run()

    def load() -> None:
        worked = time.thread_time()
        for _ in itertools.islice(batches, many):
            pass
        host.append(time.thread_time() - worked)

    def train() -> None:
        for _ in range(config.steps):
            asked = time.perf_counter()
            batch = next(batches)
            waits.append(time.perf_counter() - asked)
            trainer.step([batch])

    def loss() -> torch.Tensor:
        with torch.autocast(device.type, precision, enabled=config.gpu):
            return F.cross_entropy(network(resident.images).float(), resident.labels)

    def forward() -> None:
        for _ in range(config.steps):
            loss()

    def gradients() -> None:
        for _ in range(config.steps):
            loss().backward()

    def compute() -> None:
        for _ in range(config.steps):
            trainer.step([resident])

    jobs = {
        **dict.fromkeys((decode, read, run_graph, load, augment), many),
        **dict.fromkeys((train, compute, forward, gradients), config.steps),
    }
    found: dict[str, list[float]] = {job.__name__: [] for job in jobs}
    for number in range(1, config.rounds + 1):
        for job, count in jobs.items():
            found[job.__name__].append(rate(count * config.batch_size, job, settle))
        shown = ", ".join(f"{name} {values[-1]:,.1f}" for name, values in found.items())
        print(f"round {number} of {config.rounds}: {shown}", flush=True)
    middle = {name: statistics.median(values) for name, values in found.items()}
    seconds = config.steps * config.batch_size * config.rounds / middle["train"]
    rates = Rates(
        middle["decode"],
        middle["load"],
        middle["compute"],
        middle["train"],
        sum(waits) / seconds,
        1e6 * statistics.median(host) / (many * config.batch_size),
    )
    chains = Chains(*(middle[name] for name in ("read", "run_graph", "augment", "forward", "gradients")))
    gradient_bytes = sum(4 * parameter.numel() for parameter in network.parameters())
    parts = Stages.of(rates, chains, config.batch_size, all_reduce_ms(config, gradient_bytes))
    return Findings(rates, parts, config.threads, config.batch_size, config.machines)


def bare_graph(config: BenchmarkConfig, images: NDArray[np.uint8], info: DatasetInfo) -> Pipeline:
    """The loader's graph, built, fed the same batch again and again: center crops."""
    n = len(images)
    numbers = np.tile(np.array([0.5, 0.5, 0.0, *(255 * np.array(info.rgb.mean))], np.float32), (n, 1))
    pipeline = define(
        lambda: (images, numbers),
        n,
        config.threads,
        "gpu" if config.gpu else "cpu",
        0 if config.gpu else None,
        pixels=images.ndim > 2,
        gpu_decoder=config.gpu_decoder,
    )
    pipeline.build()
    return pipeline


def all_reduce_ms(config: BenchmarkConfig, gradient_bytes: int) -> float | None:
    """The exchange of gradients between two, by the stated bandwidth or measured on the CPU."""
    if config.network_gbit is not None:
        return stages.stated_ms(gradient_bytes, config.network_gbit)
    return None if config.gpu else stages.measured_ms(gradient_bytes, config.rounds)


def _nothing() -> None:
    """On CPU, an action is over when it returns."""


def main(config: BenchmarkConfig) -> None:
    checked = None
    if config.check_gpu:
        if not config.gpu or not torch.cuda.is_available():
            raise ValueError("--check-gpu needs a GPU, but torch sees none here: run it on a machine with one")
        device = choose_device(True)
        print(f"{torch.cuda.get_device_name(device)} against this machine's CPU, batch {config.batch_size}", flush=True)
        checked = gpu_check.check(
            config.data, device, config.batch_size, config.steps, config.threads, gpu_decoder=config.gpu_decoder
        )
        print("\n".join(checked.lines()), flush=True)
    findings = measure(config)
    name = torch.cuda.get_device_name(0) if config.gpu else processor()
    print(f"{name}, {config.threads} thread(s), batch {config.batch_size}; images/s, medians of {config.rounds}:")
    for line in findings.lines():
        print(line)
    if config.json is not None:
        versions = {"torch": torch.__version__, "dali": dali_version, "gpu_decoder": config.gpu_decoder}
        value = {"device": name, **versions, **findings.to_json()}
        write_json(config.json, value if checked is None else {**value, "gpu_check": dataclasses.asdict(checked)})
    if checked is not None:
        print(f"for docs/benchmarks.md:\n{checked.row(name, findings, config.gpu_decoder)}")
        # After the file: what a check finds is wanted most where it fails.
        checked.refuse_problems(device)


if __name__ == "__main__":
    run(BenchmarkConfig, main)
