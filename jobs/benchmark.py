"""How fast this machine feeds and trains AlexNet, and what is the limit.

Four rates over the same shard set, in one run: decoding its JPEGs whole and nothing else (the limit), the loader alone,
the network alone on a batch that stays where it is, and both together. Then torch.profiler's table of what takes the
network longest.

    python jobs/benchmark.py --data SHARDS

With --check-gpu: first compares the GPU's loader with the CPU's, and a training with a second one (`make gpu` is the
whole command).
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from jobs.cli.command import GpuChoice, run
from jobs.cli.cores import cores

IMAGENET_IMAGES = 1_281_167  # ILSVRC-2012's training set
PAPER_EPOCHS = 90  # The paper, section 5
COMPARED = 8  # Batches of a GPU, with the CPU's.
COMFORT = 1.1  # A loader less than this much faster than the network will now and then keep it waiting.


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    data: Path
    """A shard set, on the disk that training will read from."""
    json: Path | None = None
    """Also write the figures to this file."""
    check_gpu: bool = False
    """First check the GPU's batches against the CPU's, memory over 1,000 batches, and that training twice is equal."""
    gpu_decoder: Literal["cuda", "hardware"] = "cuda"
    """What decodes JPEGs on a GPU, as in jobs/train.py."""
    batch_size: int = 128
    """Images per step of this one process."""
    gpu: GpuChoice = None
    """Measure a GPU; None: if torch sees one."""
    threads: int = cores()
    """Decoder threads, and the network's threads on CPU."""
    rounds: int = 3
    """Each rate is measured so often; the median counts."""
    steps: int | None = None
    """Training steps in a round, and a quarter of the loader's and the decoder's batches; None: 8 on a CPU, 200 on a
    GPU."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "threads", "rounds", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


if __name__ == "__main__":
    run(BenchmarkConfig, "jobs.benchmark")  # Before the imports below, which take seconds.

import torch
from nvidia.dali import __version__ as dali_version
from torch.profiler import ProfilerActivity, profile
from torchvision.io import decode_jpeg

from jobs.cli.device import choose_device, processor
from jobs.diagnostics import gpu_check
from jobs.training.run_state import RunFingerprint
from jobs.training.worker import make_network, prepare_torch
from model.recipe import RECIPES
from model.training import Trainer, Worker
from pipeline.dataset.info import is_decoded, read_dataset, write_json
from pipeline.dataset.split_reader import SplitReader
from pipeline.loading.graph import PREFETCH
from pipeline.loading.loader import GROUP, Loader
from pipeline.loading.plan import Plan, color_matrix


@dataclasses.dataclass(frozen=True)
class Rates:
    """Images per second, each the median of the rounds, and what follows from them."""

    decode_limit_images_per_s: float
    """libjpeg-turbo decoding the same JPEGs whole, on as many threads."""
    loader_images_per_s: float
    network_images_per_s: float
    train_images_per_s: float
    data_wait: float
    """The fraction of training time spent waiting for the loader."""
    host_us_per_image: float
    """Processor time that the loader takes of the thread that trains, in microseconds."""
    threads: int
    batch_size: int

    @property
    def hours(self) -> float:
        """The paper's 90 epochs of ImageNet."""
        return PAPER_EPOCHS * IMAGENET_IMAGES / self.train_images_per_s / 3600

    def verdict(self) -> tuple[str, str]:
        """What is the limit, and what would change it: loader and network work side by side."""
        ratio = self.loader_images_per_s / self.network_images_per_s
        if ratio >= COMFORT:
            return (
                f"the network is the limit; the loader could feed {ratio:.1f} times as much",
                "more workers, or a faster device; the loader need not change",
            )
        part = self.loader_images_per_s / self.decode_limit_images_per_s
        return (
            f"the loader is the limit, with {self.threads} threads: it gives {ratio:.0%} of what the network takes and "
            f"{part:.0%} of bare decoding",
            "give each worker more cores (--threads here, --cpus-per-worker when training), or train with --stage-as "
            "pixels; if cores are idle, keep the set on a faster disk or in memory (/dev/shm)",
        )

    def lines(self) -> list[str]:
        """What a person reads."""
        verdict, advice = self.verdict()
        return [
            f"  decoding alone (the limit)  {self.decode_limit_images_per_s:10.1f}",
            f"  loader alone                {self.loader_images_per_s:10.1f}",
            f"  network alone               {self.network_images_per_s:10.1f}",
            f"  training                    {self.train_images_per_s:10.1f}   waiting for data {self.data_wait:.2%}",
            f"  the loader takes {self.host_us_per_image:.1f} us an image of the thread that trains",
            verdict,
            f"to go faster: {advice}",
            f"the paper's {PAPER_EPOCHS} epochs of ImageNet on this machine: {self.hours:,.1f} hours",
        ]

    def to_json(self) -> dict[str, Any]:
        """The same as data."""
        verdict, advice = self.verdict()
        return {**dataclasses.asdict(self), "verdict": verdict, "advice": advice, "hours_90_epochs": self.hours}


def make_trainer(config: BenchmarkConfig, device: torch.device) -> Trainer:
    """One worker of the default recipe, with its initial weights."""
    recipe = dataclasses.replace(RECIPES["default"], batch_size=config.batch_size)
    prepare_torch(device, config.threads)
    network = make_network(RunFingerprint.of(recipe, read_dataset(config.data))).train()
    network.to(memory_format=torch.channels_last).to(device)
    precision = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Trainer(network, recipe, Worker(0, 1, device, precision))


def measure(config: BenchmarkConfig) -> tuple[Rates, str]:
    """The rates, and the profiler's table of one step. Each round measures all rates: they share its drift."""
    info = read_dataset(config.data)
    reader = SplitReader(config.data, info, "train")
    device = choose_device(config.gpu)
    gpu = device.type == "cuda"
    trainer = make_trainer(config, device)
    recipe = trainer.recipe
    plan = Plan(len(reader), config.batch_size, recipe.seed, color_matrix(info.rgb, recipe.color))
    loader = Loader(reader, info.rgb, config.batch_size, device, config.threads, gpu_decoder=config.gpu_decoder)
    batches = loader.run(plan.endless())
    resident = next(batches)
    trainer.step([resident])
    steps = config.steps or (200 if gpu else 8)
    many = 4 * steps
    images = range(many * config.batch_size)
    encoded = [torch.from_numpy(reader.image(i).copy()) for i in range(min(len(reader), len(images)))]
    waits: list[float] = []
    host: list[float] = []

    def decode() -> None:
        with concurrent.futures.ThreadPoolExecutor(config.threads) as pool:
            for _ in pool.map(lambda i: decode_jpeg(encoded[i % len(encoded)]), images):
                pass

    def load() -> None:
        worked = time.thread_time()
        for _ in itertools.islice(batches, many):
            pass
        host.append(time.thread_time() - worked)

    def compute() -> None:
        for _ in range(steps):
            trainer.step([resident])

    def train() -> None:
        for _ in range(steps):
            asked = time.perf_counter()
            batch = next(batches)
            waits.append(time.perf_counter() - asked)
            trainer.step([batch])

    counts = {decode: many, load: many, compute: steps, train: steps}
    found: dict[Callable[[], None], list[float]] = {action: [] for action in counts}
    for number in range(1, config.rounds + 1):
        for action, count in counts.items():
            # What was decoded while others were timed is not this action's.
            for _ in itertools.islice(batches, PREFETCH * -(-GROUP // config.batch_size)):
                pass
            started = time.perf_counter()
            action()
            if gpu:
                torch.cuda.synchronize()
            found[action].append(count * config.batch_size / (time.perf_counter() - started))
        shown = ", ".join(f"{action.__name__} {values[-1]:,.1f}" for action, values in found.items())
        print(f"round {number} of {config.rounds}, images/s: {shown}", flush=True)
    decoding, loading, computing, training = (statistics.median(values) for values in found.values())
    rates = Rates(
        decode_limit_images_per_s=decoding,
        loader_images_per_s=loading,
        network_images_per_s=computing,
        train_images_per_s=training,
        data_wait=statistics.mean(waits) * training / config.batch_size,
        host_us_per_image=1e6 * statistics.median(host) / len(images),
        threads=config.threads,
        batch_size=config.batch_size,
    )
    return rates, profiled(lambda: trainer.step([resident]), gpu)


def profiled(action: Callable[[], object], gpu: bool) -> str:
    """The ten kernels that take longest of an action on a GPU; on a CPU, the ten operators."""
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        action()
        if gpu:
            torch.cuda.synchronize()
    order = "self_cuda_time_total" if gpu else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=10)


def main(config: BenchmarkConfig) -> None:
    if is_decoded(config.data):
        raise ValueError(f"--data {config.data} is staged as pixels, with no JPEGs to decode: give the set it is of")
    checked = None
    if config.check_gpu:
        device = choose_device(config.gpu)
        if device.type != "cuda":
            raise ValueError("--check-gpu needs a GPU, but torch sees none here: run it on a machine with one")
        print(f"{torch.cuda.get_device_name(device)} against this machine's CPU, batch {config.batch_size}", flush=True)
        checked = gpu_check.check(
            config.data,
            device,
            functools.partial(make_trainer, config, device),
            config.batch_size,
            COMPARED,
            config.threads,
            gpu_decoder=config.gpu_decoder,
        )
        print("\n".join(checked.lines()), flush=True)
    rates, kernels = measure(config)
    name = torch.cuda.get_device_name(0) if choose_device(config.gpu).type == "cuda" else processor()
    print(f"{kernels}\n{name}, {config.threads} thread(s), batch {config.batch_size}; images/s, medians of rounds:")
    print("\n".join(rates.lines()))
    if config.json is not None:
        versions = {"torch": torch.__version__, "dali": dali_version, "gpu_decoder": config.gpu_decoder}
        value = {"device": name, **versions, **rates.to_json()}
        write_json(config.json, value if checked is None else {**value, "gpu_check": dataclasses.asdict(checked)})
    if checked is not None:
        # After the file: what a check finds is wanted most where it fails.
        checked.check_problems(device)
