"""What the plan costs one rank: time, and memory above what the process had before.

    python -m tests.benchmarks.plan_cost --samples 1281167 --world 1024

ImageNet's epoch on 1,024 ranks by default. The goal is below a second and 100 MB before a rank's first batch. Memory is
counted twice: what numpy asked for (tracemalloc) and by how much the process grew (the kernel's high-water mark, which
also sees the sort's scratch space).
"""

from __future__ import annotations

import dataclasses
import platform
import statistics
import time
import tracemalloc
from pathlib import Path

import numpy as np

from jobs.cli.command import run
from pipeline.dataset.info import write_json
from pipeline.loading.plan import Plan
from tests.benchmarks.contest import check_least

MAX_SECONDS = 1.0
MAX_MB = 100.0
MB = 1e6


@dataclasses.dataclass(frozen=True)
class PlanCostConfig:
    samples: int = 1_281_167
    """Training images; by default ImageNet's."""
    world: int = 1024
    """Ranks that share each batch."""
    batch_per_rank: int = 128
    """Images per step of one rank."""
    rounds: int = 5
    """Each time is the median of so many epochs."""
    batches: int = 100
    """Batches timed in each epoch, or as many as it has."""
    json: Path | None = None
    """Also write the figures to this file."""

    def __post_init__(self) -> None:
        check_least(self, "samples", "world", "batch_per_rank", "rounds", "batches")


@dataclasses.dataclass(frozen=True)
class PlanCost:
    """Medians over the rounds, but for the memory, which is the peak of a first epoch."""

    order_s: float
    """The epoch's permutation of all samples."""
    first_batch_s: float
    """From asking for an epoch to the rank's first batch, the permutation included."""
    batch_s: float
    """Each batch after it."""
    numpy_mb: float
    """Peak of what numpy allocated up to the first batch."""
    process_mb: float
    """Growth of the process's largest resident size up to the first batch."""

    @property
    def met(self) -> bool:
        """Whether time and memory stay below the goal."""
        return self.first_batch_s < MAX_SECONDS and max(self.numpy_mb, self.process_mb) < MAX_MB


def measure(config: PlanCostConfig) -> PlanCost:
    """Times one rank's plan; the last rank's, whose part of a batch starts furthest in."""
    plan = Plan(config.samples, config.world * config.batch_per_rank, 0, np.eye(3))
    rank = config.world - 1
    Plan(1000, 1, 0, np.eye(3)).order(0)  # What a first call loads is not the plan's.
    before = high_water_mb()
    next(plan.epoch(0, rank=rank, world=config.world))
    grown = high_water_mb() - before
    tracemalloc.start()
    next(plan.epoch(0, rank=rank, world=config.world))
    traced = tracemalloc.get_traced_memory()[1] / MB
    tracemalloc.stop()

    orders, firsts, rest = [], [], []
    for epoch in range(config.rounds):
        asked = time.perf_counter()
        plan.order(epoch)
        orders.append(time.perf_counter() - asked)
        asked = time.perf_counter()
        batches = plan.epoch(epoch, rank=rank, world=config.world)
        next(batches)
        firsts.append(time.perf_counter() - asked)
        asked = time.perf_counter()
        count = sum(1 for _ in zip(range(config.batches), batches, strict=False))
        rest.append((time.perf_counter() - asked) / max(count, 1))
    order, first, batch = (statistics.median(values) for values in (orders, firsts, rest))
    return PlanCost(order, first, batch, traced, grown)


def high_water_mb(pid: int | str = "self") -> float:
    """The largest resident size of a process so far, in MB.

    Raises:
        ValueError: if it has ended, but is not collected.
    """
    for line in Path(f"/proc/{pid}/status").read_text("utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / MB
    raise ValueError(f"/proc/{pid}/status has no VmHWM")


def main(config: PlanCostConfig) -> None:
    cost = measure(config)
    print(
        f"{platform.processor() or platform.machine()}, numpy {np.__version__}: {config.samples:,} samples, one of "
        f"{config.world:,} ranks, {config.batch_per_rank} images a step each; medians of {config.rounds}:"
    )
    print(f"  permutation of the epoch    {cost.order_s * 1e3:10.1f} ms")
    print(f"  first batch, with it        {cost.first_batch_s * 1e3:10.1f} ms")
    print(f"  each batch after            {cost.batch_s * 1e3:10.3f} ms")
    print(f"  peak memory, numpy          {cost.numpy_mb:10.1f} MB")
    print(f"  peak memory, process        {cost.process_mb:10.1f} MB")
    print(f"below {MAX_SECONDS:g} s and {MAX_MB:g} MB: {'yes' if cost.met else 'no'}")
    if config.json is not None:
        write_json(config.json, {**dataclasses.asdict(cost), "met": cost.met})


if __name__ == "__main__":
    run(PlanCostConfig, main)
