"""Does AlexNet start to learn? The first steps of training, for the paper's initialization and for deviations from it.

    python -m tests.benchmarks.initial_bias --data SHARDS --hidden-bias 0.1 --seeds 0 1 2

For each seed: the loss, each layer's gradient norm and the share of its units that no image of the batch wakes up; and
the step at which the mean loss of twenty steps has left ln(classes) by a tenth of a nat, if it does. Units that nothing
wakes get no gradient: once a whole layer is dead, nothing below it learns again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.cli.command import run
from model.alexnet import AlexNet
from model.optimizer import make_optimizer
from model.recipe import Recipe
from pipeline.dataset.info import read_dataset, write_json
from pipeline.dataset.split_reader import SplitReader
from pipeline.loading.loader import Loader
from pipeline.loading.plan import Plan, color_matrix
from tests.benchmarks.contest import check_least

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7")
WINDOW = 20  # Steps over which the loss is averaged.
MARGIN = 0.1  # Nats below ln(classes) that count as having started to learn.


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    data: Path
    """A shard set."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Initial weights, plan and dropout."""
    hidden_bias: float = 1.0
    """Initial bias of conv2, conv4, conv5, fc6 and fc7; the paper: 1."""
    lr: float = 0.01
    """The paper: 0.01."""
    warm_up: int = 0
    """Steps over which the rate rises linearly to --lr; the paper: none."""
    clip: float = math.inf
    """Largest norm of the whole gradient; the paper: none."""
    batch_size: int = 128
    """The paper: 128."""
    steps: int = 200
    """Give up after so many."""
    json: Path | None = None
    """Also write every step's figures here."""

    def __post_init__(self) -> None:
        check_least(self, "steps")


def measure(config: StudyConfig, seed: int) -> dict[str, object]:
    """Trains one seed until it has started to learn or the steps are used up."""
    info = read_dataset(config.data)
    reader = SplitReader(config.data, info, "train")
    recipe = Recipe(batch_size=config.batch_size, lr=config.lr, hidden_bias=config.hidden_bias, seed=seed)
    plan = Plan(len(reader), recipe.batch_size, seed, color_matrix(info.rgb))
    loader = Loader(reader, info.rgb, recipe.batch_size, torch.device("cpu"), os.cpu_count() or 1)
    torch.manual_seed(seed)
    network = AlexNet(len(info.classes))
    network.initialize(seed, recipe.hidden_bias)
    network = network.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(network, recipe)
    asleep: dict[str, float] = {}
    watch(network, asleep)

    chance = math.log(len(info.classes))
    rows: list[dict[str, object]] = []
    losses: list[float] = []
    started = None
    begun = time.perf_counter()
    batches = (batch for epoch in range(recipe.epochs) for batch in loader.run(plan.epoch(epoch)))
    for step, batch in zip(range(1, config.steps + 1), batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, step / (config.warm_up + 1))
        optimizer.zero_grad()
        loss = F.cross_entropy(network(batch.images), batch.labels)
        loss.backward()
        norms = {name: float(getattr(network, name).weight.grad.norm()) for name in LAYERS}
        nn.utils.clip_grad_norm_(network.parameters(), config.clip)
        optimizer.step()
        losses.append(loss.item())
        mean = sum(losses[-WINDOW:]) / len(losses[-WINDOW:])
        rows.append({"step": step, "loss": losses[-1], "mean": mean, "gradient": norms, "asleep": dict(asleep)})
        if step in (1, 2, 3, 5, 10) or step % 20 == 0:
            print(
                f"seed {seed} step {step}: loss {losses[-1]:.3f}, mean of {WINDOW} {mean:.3f}, gradient conv1 "
                f"{norms['conv1']:.1e} fc7 {norms['fc7']:.1e}, asleep conv5 {asleep['conv5']:.0%} "
                f"fc7 {asleep['fc7']:.0%}, {time.perf_counter() - begun:.0f} s",
                flush=True,
            )
        if step >= WINDOW and mean < chance - MARGIN:
            started = step
            break
    verdict = (
        f"started to learn at step {started}" if started else f"had not started to learn after {len(losses)} steps"
    )
    print(f"seed {seed}: highest loss {max(losses):.2f}; {verdict}", flush=True)
    return {"seed": seed, "started": started, "highest_loss": max(losses), "steps": rows}


def watch(network: AlexNet, asleep: dict[str, float]) -> None:
    """Keeps, for each layer, the share of its units (maps, for a convolution) that no image of the last batch woke."""

    def hook(name: str) -> None:
        def record(_: nn.Module, __: object, output: Tensor) -> None:
            active = (output.detach() > 0).flatten(2).any(2) if output.dim() == 4 else output.detach() > 0
            asleep[name] = 1.0 - float(active.any(0).float().mean())

        getattr(network, name).register_forward_hook(record)

    for name in LAYERS:
        hook(name)


def main(config: StudyConfig) -> None:
    settings = {key: str(value) for key, value in dataclasses.asdict(config).items()}
    print(json.dumps(settings))
    results = [measure(config, seed) for seed in config.seeds]
    print(f"started to learn: {sum(r['started'] is not None for r in results)} of {len(results)} seeds")
    if config.json is not None:
        write_json(config.json, {"settings": settings, "seeds": results})


if __name__ == "__main__":
    run(StudyConfig, main)
