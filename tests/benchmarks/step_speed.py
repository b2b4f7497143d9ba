"""What each part of the training step costs: the whole step, with one thing changed at a time, turn and turn about.

    python -m tests.benchmarks.step_speed --batch-size 32 --rounds 7

Every variant trains the same network on one batch that stays where it is, at a rate of 0, so that all do the same sums;
a step is forward, loss, backward, update and the guards' norm. Variants take turns within a round, and a ratio is the
median over the rounds of two variants' ratio in one round: what else the machine does then slows both. On a machine
that does much else, the ratio of the processor's time still says what a step costs; --threads 1 makes it sharper, since
threads that wait for each other count as busy.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import time
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from jobs.cli.command import run
from jobs.cli.device import choose_device
from model.alexnet import INPUT_SIZE, AlexNet
from model.lrn import PAPER_ALPHA, PAPER_BETA, PAPER_K, PAPER_SIZE, LocalResponseNorm
from model.recipe import RECIPES
from model.training import Trainer, Worker
from pipeline.dataset.info import write_json
from tests.benchmarks.contest import check_least

OURS = "as trained"


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to make a step; the defaults are how jobs/train.py does."""

    lrn: str = "ours"
    """ours, torch or none."""
    channels_last: bool = True
    bfloat16: bool = False
    update: str = "fused"
    """fused, foreach or single: the kind of torch's SGD."""
    guards: bool = True
    """Whether the gradient's norm is taken."""
    compiled: bool = False


VARIANTS = {
    OURS: Variant(),
    "torch's LocalResponseNorm": Variant(lrn="torch"),
    "torch's LocalResponseNorm, NCHW": Variant(lrn="torch", channels_last=False),
    "without LRN": Variant(lrn="none"),
    "NCHW": Variant(channels_last=False),
    "foreach update": Variant(update="foreach"),
    "one update a tensor": Variant(update="single"),
    "without the guards' norm": Variant(guards=False),
    "bfloat16": Variant(bfloat16=True),
    "torch.compile": Variant(compiled=True),
}


@dataclasses.dataclass(frozen=True)
class StepConfig:
    batch_size: int = 32
    """Images per step; the paper: 128."""
    rounds: int = 7
    """Each variant has so many turns, after one that does not count."""
    steps: int = 1
    """Steps in a turn."""
    classes: int = 1000
    """Outputs of the network."""
    variants: tuple[str, ...] = tuple(VARIANTS)[:-2]
    """Which ones; bfloat16 and torch.compile must be asked for, since both can take minutes on a CPU."""
    threads: int = os.cpu_count() or 1
    """Threads on CPU."""
    gpu: bool = dataclasses.field(default_factory=torch.cuda.is_available)
    """Measure a GPU; by default, if torch sees one."""
    json: Path | None = None
    """Also write every turn's seconds to this file."""

    def __post_init__(self) -> None:
        check_least(self, "batch_size", "rounds", "steps", "threads")
        if unknown := [name for name in self.variants if name not in VARIANTS]:
            raise ValueError(f"--variants {', '.join(unknown)}: must be among {', '.join(VARIANTS)}")
        if OURS not in self.variants:
            raise ValueError(f"--variants must hold {OURS!r}: the others are compared with it")


class _Batch(NamedTuple):
    images: Tensor
    labels: Tensor


def norms(kind: str) -> tuple[nn.Module, nn.Module]:
    """What stands in the network's two places for LRN."""
    if kind == "none":
        return nn.Identity(), nn.Identity()
    if kind == "ours":
        return LocalResponseNorm(96), LocalResponseNorm(256)
    # Its alpha multiplies the mean over the neighbors, the paper's their sum.
    theirs = nn.LocalResponseNorm(PAPER_SIZE, alpha=PAPER_ALPHA * PAPER_SIZE, beta=PAPER_BETA, k=PAPER_K)
    return theirs, theirs


class Turn(NamedTuple):
    """Seconds of some steps."""

    wall: float
    processor: float


class Stepper:
    """Takes a variant's steps; all variants share the network's parameters.

    Args:
        variant: what is changed.
        network: on the device.
        images: [n, 3, 227, 227] on the device.
        labels: int64 [n] on the device.
    """

    def __init__(self, variant: Variant, network: AlexNet, images: Tensor, labels: Tensor) -> None:
        self._variant, self._network = variant, network
        self._layout = torch.channels_last if variant.channels_last else torch.contiguous_format
        self._norms = [norm.to(images.device) for norm in norms(variant.lrn)]
        self.take_over()
        self._batch = [_Batch(images.contiguous(memory_format=self._layout), labels)]
        # At rate 0 the weights stay what they are, whoever has stepped before.
        recipe = dataclasses.replace(RECIPES["default"], batch_size=len(images), lr=0.0)
        precision = torch.bfloat16 if variant.bfloat16 else torch.float32
        self._trainer = Trainer(network, recipe, Worker(0, 1, images.device, precision))
        if variant.update != "fused":
            groups = [{"params": group["params"]} for group in self._trainer.optimizer.param_groups]
            self._trainer.optimizer = torch.optim.SGD(
                groups,
                lr=0.0,
                momentum=recipe.momentum,
                weight_decay=recipe.weight_decay,
                foreach=variant.update == "foreach",
            )
        if variant.compiled:
            self._trainer._parallel = cast(nn.Module, torch.compile(network))

    def take_over(self) -> None:
        """Makes the shared network this variant's, in normalization and memory layout."""
        self._network.norm1, self._network.norm2 = self._norms
        self._network.to(memory_format=self._layout)

    def step(self) -> None:
        self._trainer.step(self._batch)
        if self._variant.guards:
            self._trainer.gradient_norm()


def measure(config: StepConfig) -> dict[str, list[Turn]]:
    """Each variant's turns."""
    device = choose_device(config.gpu)
    torch.set_num_threads(config.threads)
    generator = torch.Generator().manual_seed(0)
    images = 60.0 * torch.randn(config.batch_size, 3, INPUT_SIZE, INPUT_SIZE, generator=generator)
    labels = torch.randint(config.classes, (config.batch_size,), generator=generator)
    network = AlexNet(config.classes)
    network.initialize(0, RECIPES["default"].hidden_bias)
    network.to(device).train()
    steppers = {
        name: Stepper(VARIANTS[name], network, images.to(device), labels.to(device)) for name in config.variants
    }
    # On CPU, an action is over when it returns.
    settle = torch.cuda.synchronize if config.gpu else lambda: None
    turns: dict[str, list[Turn]] = {name: [] for name in steppers}
    for number in range(config.rounds + 1):
        for name, stepper in steppers.items():
            stepper.take_over()
            settle()
            started = Turn(time.perf_counter(), time.process_time())
            for _ in range(config.steps):
                stepper.step()
            settle()
            turns[name].append(Turn(time.perf_counter() - started.wall, time.process_time() - started.processor))
        shown = ", ".join(f"{name} {values[-1].wall:.2f}" for name, values in turns.items())
        print(f"{f'round {number}' if number else 'warm-up'} (s): {shown}", flush=True)
    return {name: values[1:] for name, values in turns.items()}


def table(turns: dict[str, list[Turn]], images: int) -> list[str]:
    """Markdown: each variant's images/s, its step's time by ours with its range over the rounds, and the processor's.

    Args:
        turns: each variant's.
        images: of one turn.
    """
    rows = ["| step | images/s | time by ours | range | processor's time by ours |", "| --- | --- | --- | --- | --- |"]
    for name, values in turns.items():
        pairs = list(zip(values, turns[OURS], strict=True))
        wall = [value.wall / ours.wall for value, ours in pairs]
        processor = statistics.median(value.processor / ours.processor for value, ours in pairs)
        rows.append(
            f"| {name} | {images / statistics.median(value.wall for value in values):.1f} "
            f"| {statistics.median(wall):.3f} | {min(wall):.2f} to {max(wall):.2f} | {processor:.3f} |"
        )
    return rows


def main(config: StepConfig) -> None:
    turns = measure(config)
    machine = torch.cuda.get_device_name(0) if config.gpu else f"{platform.machine()}, {config.threads} thread(s)"
    print(f"{machine}, batch {config.batch_size}, {config.classes} classes, medians of {config.rounds} rounds:")
    for row in table(turns, config.batch_size * config.steps):
        print(row)
    if config.json is not None:
        write_json(config.json, {name: [turn._asdict() for turn in values] for name, values in turns.items()})


if __name__ == "__main__":
    run(StepConfig, main)
