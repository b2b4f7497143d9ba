"""Does it learn as other code does? Networks trained side by side on as many images each, over several seeds.

    python -m tests.benchmarks.learning --data SHARDS --work FOLDER

- ours: a recipe's network by this project's plan, loader and loop, in one process, with the paper's color shift.
- plain PyTorch: the same network from the same initial weights, in a loop as a tutorial has it: ImageFolder over the
  same stored JPEGs, torchvision's RandomCrop and RandomHorizontalFlip, DataLoader, torch.optim.SGD. No color shift.
- torchvision: its `alexnet`, in the same loop, with its own initial weights and its own mean and deviation.
- ours, no color: ours without the color shift.
- ours, ten crops: ours's trained weights, judged by the paper's ten crops instead of the center's.

Optimizer (the paper's), rate, batch and steps are the same for all, and all are judged by the same sums, each on its
own validation images. The network with batch normalization learns from the first step (at a rate of 0.002; at 0.01 its
loss rose), where the first 3,000 images or so leave that with LRN where it was. A run takes a minute and a half on two
cores; each finished one is kept in --work, and the same command continues with the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import transforms

from jobs.cli.command import run
from jobs.cli.device import processor
from jobs.training.run_state import RunFingerprint
from jobs.training.worker import WorkerData, make_network
from model.alexnet import INPUT_SIZE, AlexNet
from model.metrics import LabeledImages, Score, evaluate
from model.recipe import RECIPES, Recipe
from model.training import StepAction, StoppedError, Trainer, Worker
from pipeline.dataset.info import read_dataset, write_json
from pipeline.dataset.split_reader import SplitReader
from pipeline.loading.loader import Loader
from pipeline.loading.plan import center_crops
from tests.benchmarks.loader_sets import make_folder

CPU = torch.device("cpu")
TORCHVISION_SIZE = 224
TORCHVISION_MEAN, TORCHVISION_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # Of its references/classification
JUDGED_AT_ONCE = 20


@dataclasses.dataclass(frozen=True)
class LearningConfig:
    data: Path
    """A shard set."""
    work: Path
    """Where results, weights and the unpacked JPEGs are kept; the same command continues from there."""
    contenders: tuple[str, ...] = ("ours", "plain PyTorch", "ours, no color", "torchvision", "ours, ten crops")
    """Which ones."""
    recipe: str = "batchnorm"
    """Whose network, initial weights and dropout; one of model/recipe.py's."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of initial weights, order, windows and dropout."""
    batch_size: int = 32
    """Images per step; the paper: 128."""
    steps: int = 64
    """Updates of each run."""
    lr: float = 0.002
    """Of all contenders; the paper: 0.01, for its network."""
    threads: int = os.cpu_count() or 1
    """Threads of the network and of our decoder; the plain loop's DataLoader has as many workers."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.contenders if name not in CONTENDERS]:
            raise ValueError(f"--contenders {', '.join(unknown)}: must be among {', '.join(CONTENDERS)}")
        if self.recipe not in RECIPES:
            raise ValueError(f"--recipe {self.recipe}: must be among {', '.join(RECIPES)}")
        if not self.seeds or min(self.batch_size, self.steps, self.threads) < 1:
            raise ValueError("give --seeds, and at least 1 as --batch-size, --steps and --threads")

    def of_seed(self, seed: int, color: str = "eigenvalue") -> Recipe:
        """The recipe with what this study fixes: the paper's update, at one rate to the end."""
        return dataclasses.replace(
            RECIPES[self.recipe],
            batch_size=self.batch_size,
            lr=self.lr,
            seed=seed,
            color=color,
            optimizer="sgd",
            biases="paper",
            schedule="plateau",
            warm_up_epochs=0,
            epochs=10**6,
            patience=10**6,
        )

    def settings(self) -> dict[str, Any]:
        """What results must have in common to stand in one table."""
        names = ("recipe", "batch_size", "steps", "lr")
        return {"data": str(self.data), **{name: getattr(self, name) for name in names}}


class Batch(NamedTuple):
    """What `evaluate` judges."""

    images: Tensor
    labels: Tensor


class Until:
    """Stops the project's loop after some steps (`model.training.Observer`)."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def on_step_end(self, trainer: Trainer, batches: Sequence[LabeledImages], own_seconds: float) -> StepAction:
        self._left -= 1
        return StepAction.NOTHING if self._left else StepAction.STOP

    def on_log(self, trainer: Trainer, score: Score, images_per_s: float, data_wait: float) -> None:
        print(f"  {self._left} steps to go: loss {score.loss:.3f}, {images_per_s:.1f} images/s", flush=True)

    def on_epoch_end(self, trainer: Trainer, row: dict[str, Any]) -> None:
        print(f"  epoch {row['epoch']}: error {row['top1_error']:.1%}", flush=True)

    def on_validation_batch(self, trainer: Trainer) -> StepAction:
        return StepAction.NOTHING

    def checkpoint(self, trainer: Trainer) -> None:
        """None is kept: a run that is cut off starts again."""

    def on_warning(self, trainer: Trainer, warning: str) -> None:
        print(f"  {warning}", flush=True)


def make_ours(config: LearningConfig, seed: int) -> AlexNet:
    identity = RunFingerprint.of(config.of_seed(seed), read_dataset(config.data))
    return make_network(identity).to(memory_format=torch.channels_last)


def train_ours(config: LearningConfig, seed: int, color: str) -> tuple[AlexNet, Score]:
    """The project's loop over the project's data."""
    recipe, worker = config.of_seed(seed, color), Worker(0, 1, CPU)
    data = WorkerData(config.data, recipe, worker, recipe.batch_size, config.threads)
    network = make_ours(config, seed)
    trainer = Trainer(network, recipe, worker)
    with contextlib.suppress(StoppedError):
        trainer.fit(data, Until(config.steps))
    return network, Score.of(evaluate(network, data.validation(), CPU))


def ours(config: LearningConfig, seed: int) -> Score:
    network, score = train_ours(config, seed, "eigenvalue")
    save_model(network, str(weights_file(config, seed)))
    return score


def ours_without_color(config: LearningConfig, seed: int) -> Score:
    return train_ours(config, seed, "none")[1]


def ours_by_ten_crops(config: LearningConfig, seed: int) -> Score:
    if not weights_file(config, seed).exists():
        raise ValueError(f"there are no trained weights of seed {seed}: let --contenders have 'ours' before ten crops")
    network = make_ours(config, seed)
    load_model(network, str(weights_file(config, seed)))
    info = read_dataset(config.data)
    reader = SplitReader(config.data, info, "val")
    loader = Loader(reader, info.rgb, JUDGED_AT_ONCE, CPU, config.threads, ten_crop=True)
    planned = center_crops(np.arange(len(reader))).chunks(JUDGED_AT_ONCE)
    return Score.of(evaluate(network, loader.run(planned), CPU, crops=10))


def weights_file(config: LearningConfig, seed: int) -> Path:
    return config.work / f"ours-{seed}.safetensors"


def train_plain(
    config: LearningConfig, seed: int, network: nn.Module, size: int, mean: Sequence[float], std: Sequence[float]
) -> Score:
    """A loop as PyTorch's own tutorials have it, with nothing of this project but the network that is handed in.

    Args:
        config: the study.
        seed: of order, windows and dropout.
        network: takes images of `size`, less `mean` and divided by `std`.
        size: of the window.
        mean: of RGB in [0, 1].
        std: what RGB in [0, 1] is divided by.
    """
    torch.manual_seed(seed)
    scale = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    augment = transforms.Compose([transforms.RandomCrop(size), transforms.RandomHorizontalFlip(), *scale])
    center = transforms.Compose([transforms.CenterCrop(size), *scale])
    folders = {split: unpacked(config, split) for split in ("train", "val")}
    train = torchvision.datasets.ImageFolder(str(folders["train"]), augment)
    val = torchvision.datasets.ImageFolder(str(folders["val"]), center)
    batches = DataLoader(train, config.batch_size, shuffle=True, drop_last=True, num_workers=config.threads)
    optimizer = torch.optim.SGD(network.parameters(), lr=config.lr, momentum=0.9, weight_decay=0.0005, fused=True)
    network.train()
    for step, (images, labels) in zip(range(1, config.steps + 1), endless(batches), strict=False):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"  {config.steps - step} steps to go: loss {loss.item():.3f}", flush=True)
    judged = (Batch(images, labels) for images, labels in DataLoader(val, JUDGED_AT_ONCE))
    return Score.of(evaluate(network, judged, CPU))


def endless(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Epoch after epoch."""
    return itertools.chain.from_iterable(itertools.repeat(batches))


def unpacked(config: LearningConfig, split: str) -> Path:
    """A folder a class of the split's stored JPEGs."""
    folder = config.work / "images" / split
    if not folder.exists():
        partial = folder.with_name(f"{split}.partial")
        make_folder(config.data, partial, split)
        partial.rename(folder)
    return folder


def plain(config: LearningConfig, seed: int) -> Score:
    # As ours has its pixels: gray levels less the training set's mean.
    mean = read_dataset(config.data).rgb.mean
    return train_plain(config, seed, make_ours(config, seed), INPUT_SIZE, mean, [1 / 255] * 3)


def torchvisions(config: LearningConfig, seed: int) -> Score:
    torch.manual_seed(seed)
    network = torchvision.models.alexnet(num_classes=len(read_dataset(config.data).classes))
    return train_plain(config, seed, network, TORCHVISION_SIZE, TORCHVISION_MEAN, TORCHVISION_STD)


CONTENDERS: dict[str, Callable[[LearningConfig, int], Score]] = {
    "ours": ours,
    "plain PyTorch": plain,
    "torchvision": torchvisions,
    "ours, no color": ours_without_color,
    "ours, ten crops": ours_by_ten_crops,
}


def result_file(config: LearningConfig, contender: str, seed: int) -> Path:
    return config.work / f"{contender.replace(', ', '-').replace(' ', '-')}-{seed}.json"


def read_result(config: LearningConfig, contender: str, seed: int) -> Score | None:
    """A finished run's, if it is finished.

    Raises:
        ValueError: if it was made with other settings.
    """
    path = result_file(config, contender, seed)
    if not path.exists():
        return None
    kept = json.loads(path.read_text("utf-8"))
    if kept["settings"] != config.settings():
        raise ValueError(f"{path} is of other settings, {kept['settings']}: give another --work")
    return Score(**kept["score"])


def spread(values: Sequence[float], form: str) -> str:
    """Mean and range, as a table's cell."""
    low, high = format(min(values), form), format(max(values), form)
    return f"{format(statistics.mean(values), form)} ({low} to {high})"


def table(scores: dict[str, list[Score]]) -> list[str]:
    """Markdown: each contender's mean over the seeds, and their range."""
    rows = ["| | seeds | top-1 error, % | top-5 error, % | loss |", "| --- | --- | --- | --- | --- |"]
    for name, found in scores.items():
        top1, top5 = ([100 * getattr(score, f"{kind}_error") for score in found] for kind in ("top1", "top5"))
        cells = [spread(top1, ".1f"), spread(top5, ".1f"), spread([score.loss for score in found], ".3f")]
        rows.append(f"| {name} | {len(found)} | {' | '.join(cells)} |")
    return rows


def main(config: LearningConfig) -> None:
    config.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(config.threads)
    runs = [(name, seed) for seed in config.seeds for name in config.contenders]
    for number, (name, seed) in enumerate(runs, start=1):
        if read_result(config, name, seed) is not None:
            continue
        print(f"run {number} of {len(runs)}: {name}, seed {seed}", flush=True)
        score = CONTENDERS[name](config, seed)
        write_json(result_file(config, name, seed), {"settings": config.settings(), "score": dataclasses.asdict(score)})
        print(f"  top-1 error {score.top1_error:.1%}, top-5 {score.top5_error:.1%}, loss {score.loss:.3f}", flush=True)
    info = read_dataset(config.data)
    print(
        f"{processor()}, {config.threads} thread(s): recipe {config.recipe}, {config.batch_size * config.steps} images "
        f"seen in {config.steps} steps of {config.batch_size} at rate {config.lr:g}; {len(info.classes)} classes, "
        f"{info.splits['val'].samples} validation images"
    )
    scores = {name: [read_result(config, name, seed) for seed in config.seeds] for name in config.contenders}
    for row in table({name: [score for score in found if score is not None] for name, found in scores.items()}):
        print(row)


if __name__ == "__main__":
    run(LearningConfig, main)
