"""Does it learn as other code does? Networks trained side by side until the plateau schedule stops, over some seeds.

    python -m tests.benchmarks.learning --data SHARDS --work FOLDER --json docs/benchmarks/learning.json

- ours: the default recipe's network by this project's plan, loader and loop, in one process.
- plain PyTorch: the same network from the same initial weights, in a loop as a tutorial has it: ImageFolder over the
  same stored JPEGs, torchvision's RandomCrop and RandomHorizontalFlip, DataLoader, torch.optim.SGD and
  ReduceLROnPlateau. It draws other crops and flips in another order, and has no color shift.

Rate, batch, patience and precision are the same for both; each is judged on its own center crops of the validation
images by the same sums. Each finished run is kept in --work, and the same command continues with the others.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import transforms

from jobs.cli.command import GpuChoice, run
from jobs.cli.cores import cores
from jobs.cli.device import choose_device, processor
from jobs.training.run_state import RunFingerprint
from jobs.training.worker import WorkerData, make_network, prepare_torch
from model.alexnet import INPUT_SIZE, AlexNet
from model.metrics import Score, evaluate
from model.recipe import RECIPES, Recipe
from model.schedule import PAPER_FACTOR, PAPER_REDUCTIONS
from model.training import Trainer, Worker
from pipeline.dataset.info import read_dataset, write_json
from tests.benchmarks.contest import check_least
from tests.benchmarks.loader_sets import make_folder
from tests.benchmarks.torchrun_rank import Quiet

JUDGED_AT_ONCE = 100
Row = dict[str, Any]
"""epoch, lr, train_loss, val_loss, val_top1_error, val_top5_error."""


@dataclasses.dataclass(frozen=True)
class LearningConfig:
    data: Path
    """A shard set."""
    work: Path
    """Where results and the unpacked JPEGs are kept; the same command continues from there."""
    contenders: tuple[str, ...] = ("ours", "plain PyTorch")
    """Which ones."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of initial weights, order, crops and dropout."""
    batch_size: int = 32
    """Images per step; the paper: 128."""
    lr: float = 0.01
    """At the start; the paper's."""
    patience: int = 3
    """Epochs without a better validation error before the rate drops."""
    epochs: int = 90
    """Stop after so many, if the schedule has not stopped before."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the network."""
    gpu: GpuChoice = None
    """Train on a GPU; None: if torch sees one."""
    threads: int = cores()
    """Threads of the network on a CPU, and of our decoder; the plain loop's DataLoader has as many workers."""
    json: Path | None = None
    """Also write every epoch of every run to this file."""

    def __post_init__(self) -> None:
        check_least(self, "seeds", least=0)
        check_least(self, "threads")
        if unknown := [name for name in self.contenders if name not in CONTENDERS]:
            raise ValueError(f"--contenders {', '.join(unknown)}: must be among {', '.join(CONTENDERS)}")

    def recipe(self, seed: int) -> Recipe:
        names = ("batch_size", "lr", "patience", "epochs")
        return dataclasses.replace(RECIPES["default"], seed=seed, **{name: getattr(self, name) for name in names})

    def network(self, seed: int) -> AlexNet:
        identity = RunFingerprint.of(self.recipe(seed), read_dataset(self.data))
        return make_network(identity).to(memory_format=torch.channels_last).to(self.device)

    @functools.cached_property
    def device(self) -> torch.device:
        return choose_device(self.gpu)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    def settings(self) -> dict[str, Any]:
        """What results must have in common to stand in one table."""
        names = ("batch_size", "lr", "patience", "epochs", "precision")
        return {"data": str(self.data), "device": self.device.type, **{name: getattr(self, name) for name in names}}


def print_row(row: Row) -> None:
    print(
        f"  epoch {row['epoch']}: rate {row['lr']:g}, train loss {row['train_loss']:.3f}, "
        f"val loss {row['val_loss']:.3f}, error {row['val_top1_error']:.1%}",
        flush=True,
    )


class Collector(Quiet):
    """Keeps each epoch's row of the project's loop. No checkpoint is kept: a run that is cut off starts again."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def on_epoch_end(self, trainer: Trainer, row: dict[str, Any]) -> None:
        kept = {name: row[name] for name in ("epoch", "lr", "train_loss", "val_loss")}
        self.rows.append({**kept, "val_top1_error": row["top1_error"], "val_top5_error": row["top5_error"]})
        print_row(self.rows[-1])

    def on_warning(self, trainer: Trainer, warning: str) -> None:
        print(f"  {warning}", flush=True)


def ours(config: LearningConfig, seed: int) -> list[Row]:
    """The project's loop over the project's data."""
    recipe, worker = config.recipe(seed), Worker(0, 1, config.device, config.dtype)
    data = WorkerData(config.data, recipe, worker, recipe.batch_size, config.threads)
    collector = Collector()
    Trainer(config.network(seed), recipe, worker).fit(data, collector)
    return collector.rows


class Labeled(NamedTuple):
    """A batch on the device."""

    images: Tensor
    labels: Tensor


def plain(config: LearningConfig, seed: int) -> list[Row]:
    """A loop as PyTorch's own tutorials have it, with nothing of this project but the network and the sums."""
    torch.manual_seed(seed)
    network: nn.Module = config.network(seed)
    # Gray levels less the training set's mean, as ours has its pixels.
    scale = [transforms.ToTensor(), transforms.Normalize(read_dataset(config.data).rgb.mean, [1 / 255] * 3)]
    augment = transforms.Compose([transforms.RandomCrop(INPUT_SIZE), transforms.RandomHorizontalFlip(), *scale])
    center = transforms.Compose([transforms.CenterCrop(INPUT_SIZE), *scale])
    train = torchvision.datasets.ImageFolder(str(unpacked(config, "train")), augment)
    val = torchvision.datasets.ImageFolder(str(unpacked(config, "val")), center)
    loader = functools.partial(
        DataLoader[Any], num_workers=config.threads, persistent_workers=True, pin_memory=config.device.type == "cuda"
    )
    batches = loader(train, config.batch_size, shuffle=True, drop_last=True)
    judged = loader(val, JUDGED_AT_ONCE)
    optimizer = torch.optim.SGD(network.parameters(), lr=config.lr, momentum=0.9, weight_decay=0.0005)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=PAPER_FACTOR, patience=config.patience - 1, threshold=0.0, eps=0.0
    )
    smallest = config.lr * PAPER_FACTOR**PAPER_REDUCTIONS
    rows: list[Row] = []
    for epoch in range(1, config.epochs + 1):
        rate = optimizer.param_groups[0]["lr"]
        if rate < 0.5 * smallest:
            break
        network.train()
        losses = []
        for images, labels in on_device(batches, config.device):
            optimizer.zero_grad()
            with config.autocast():
                logits = network(images)
            loss = F.cross_entropy(logits.float(), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        with config.autocast():
            score = Score.of(evaluate(network, on_device(judged, config.device), config.device))
        schedule.step(score.top1_error)
        row = {"epoch": epoch, "lr": rate, "train_loss": float(torch.stack(losses).mean()), "val_loss": score.loss}
        rows.append({**row, "val_top1_error": score.top1_error, "val_top5_error": score.top5_error})
        print_row(rows[-1])
    return rows


def on_device(batches: DataLoader[Any], device: torch.device) -> Iterator[Labeled]:
    for images, labels in batches:
        yield Labeled(
            images.to(device, memory_format=torch.channels_last, non_blocking=True),
            labels.to(device, non_blocking=True),
        )


def unpacked(config: LearningConfig, split: str) -> Path:
    """A folder a class of the split's stored JPEGs."""
    folder = config.work / "images" / split
    if not folder.exists():
        partial = folder.with_name(f"{split}.partial")
        make_folder(config.data, partial, split)
        partial.rename(folder)
    return folder


CONTENDERS: dict[str, Callable[[LearningConfig, int], list[Row]]] = {"ours": ours, "plain PyTorch": plain}


def result_file(config: LearningConfig, contender: str, seed: int) -> Path:
    return config.work / f"{contender.replace(' ', '-')}-{seed}.json"


def read_result(config: LearningConfig, contender: str, seed: int) -> list[Row] | None:
    """A finished run's epochs, if it is finished.

    Raises:
        ValueError: if it was made with other settings.
    """
    path = result_file(config, contender, seed)
    if not path.exists():
        return None
    kept = json.loads(path.read_text("utf-8"))
    if kept["settings"] != config.settings():
        raise ValueError(f"{path} is of other settings, {kept['settings']}: give another --work")
    rows: list[Row] = kept["rows"]
    return rows


def spread(values: Sequence[float], form: str) -> str:
    """Mean and range, as a table's cell."""
    low, high = format(min(values), form), format(max(values), form)
    return f"{format(statistics.mean(values), form)} ({low} to {high})"


def table(runs: dict[str, list[list[Row]]]) -> list[str]:
    """Markdown: each contender's mean over the seeds, and their range."""
    rows = [
        "| | seeds | epochs | best top-1 error, % | last top-1 error, % | last top-5 error, % | last train loss |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in runs.items():
        last = [rows[-1] for rows in found]
        cells = [
            spread([float(len(rows)) for rows in found], ".0f"),
            spread([100 * min(row["val_top1_error"] for row in rows) for rows in found], ".1f"),
            spread([100 * row["val_top1_error"] for row in last], ".1f"),
            spread([100 * row["val_top5_error"] for row in last], ".1f"),
            spread([row["train_loss"] for row in last], ".3f"),
        ]
        rows.append(f"| {name} | {len(found)} | {' | '.join(cells)} |")
    return rows


def main(config: LearningConfig) -> None:
    config.work.mkdir(parents=True, exist_ok=True)
    prepare_torch(config.device, config.threads)
    found: dict[str, list[list[Row]]] = {name: [] for name in config.contenders}
    columns = []
    for seed in config.seeds:
        for name in config.contenders:
            rows = read_result(config, name, seed)
            if rows is None:
                print(f"{name}, seed {seed}", flush=True)
                rows = CONTENDERS[name](config, seed)
                write_json(result_file(config, name, seed), {"settings": config.settings(), "rows": rows})
            found[name].append(rows)
            columns.append({"run": f"{name}, seed {seed}", **{key: [row[key] for row in rows] for key in rows[0]}})
    info = read_dataset(config.data)
    name = torch.cuda.get_device_name(config.device) if config.device.type == "cuda" else processor()
    print(
        f"{name}, {config.threads} thread(s): {info.splits['train'].samples} images of {len(info.classes)} "
        f"classes in steps of {config.batch_size} from rate {config.lr:g}, patience {config.patience}, "
        f"{config.precision}; {info.splits['val'].samples} validation images"
    )
    for line in table(found):
        print(line)
    if config.json is not None:
        write_json(config.json, columns)


if __name__ == "__main__":
    run(LearningConfig, main)
