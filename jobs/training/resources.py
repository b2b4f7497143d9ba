"""How many workers a run has, and what each gets of the nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jobs.cli.workers import Workers
from jobs.cluster.connection import check_gpus_or_cluster, on_cluster
from jobs.cluster.nodes import Node
from jobs.training.config import HardwareOptions, TrainConfig
from model.recipe import RECIPES, Recipe

FEW_IMAGES = 32  # Of a batch on one GPU
MOST_CORES = 12  # Of a GPU worker by default: decoding 256 x 256 JPEGs for one GPU's AlexNet gains little beyond.


@dataclasses.dataclass(frozen=True)
class Resources:
    """What the run gets of the cluster."""

    workers: Workers
    gpus: bool
    cpus_per_worker: int

    @classmethod
    def of(cls, config: HardwareOptions, nodes: Sequence[Node]) -> Resources:
        """Settles what the command line leaves open, by the nodes that are there now; others may come.

        Raises:
            ValueError: if there is no GPU for --gpus, or the cores of a worker cannot be told, as no node with one is
                there yet.
        """
        found = sum(node.gpus for node in nodes)
        gpus = config.gpus if config.gpus is not None else found > 0
        if gpus:
            check_gpus_or_cluster(found)
        present = max(found, 1) if gpus else 1
        workers = config.workers or Workers(present, present)
        if config.cpus_per_worker:
            return cls(workers, gpus, config.cpus_per_worker)
        # Nodes that come later bring cores of their own.
        share = _most_cores(nodes, min(max(present, workers.min_workers), workers.max_workers), gpus)
        if not share and gpus:
            if not found:
                raise ValueError(
                    "no node with a GPU is there yet, so that a worker's share of its cores cannot be told: give "
                    f"--cpus-per-worker, as {MOST_CORES} for a node of 96 cores and 8 GPUs"
                )
            share = max(node.cpus // node.gpus for node in nodes if node.gpus)
        return cls(workers, gpus, max(min(share, MOST_CORES) if gpus else share, 1))

    def settle(self, config: TrainConfig) -> TrainConfig:
        """The command line with nothing left open."""
        precision = config.precision
        if precision == "auto":
            precision = "bfloat16" if self.gpus else "float32"
        most = -(-config.make_recipe().batch_size // self.workers.min_workers)
        return dataclasses.replace(
            config,
            cpus_per_worker=self.cpus_per_worker,
            precision=precision,
            micro_batch=min(config.micro_batch, most),
        )


def _room(nodes: Sequence[Node], cores: int, gpus: bool) -> int:
    """How many workers with so many cores, or a GPU too, the nodes have room for, each worker on one node."""
    return sum(min(node.cpus // cores, node.gpus) if gpus else node.cpus // cores for node in nodes)


def _most_cores(nodes: Sequence[Node], workers: int, gpus: bool) -> int:
    """The most cores that each of so many workers can have, none spread over nodes; 0 if there is no room for all."""
    most = max((node.cpus for node in nodes), default=0)
    return next((cores for cores in range(most, 0, -1) if _room(nodes, cores, gpus) >= workers), 0)


def few_images(resources: Resources, recipe: Recipe) -> str | None:
    """A warning if a GPU gets too few images of a batch to be busy; else None."""
    images = recipe.batch_size // resources.workers.max_workers
    if not resources.gpus or images >= FEW_IMAGES:
        return None
    return (
        f"warning: a GPU gets {images} of a batch's {recipe.batch_size} images, and below {FEW_IMAGES} it is not kept "
        f"busy: use fewer --workers, or --recipe large-batch with its {RECIPES['large-batch'].batch_size} images"
    )


def check_shortage(resources: Resources, nodes: Sequence[Node]) -> None:
    """Raises ValueError for what could never start: more workers than this machine holds."""
    room, needed = _room(nodes, resources.cpus_per_worker, resources.gpus), resources.workers.min_workers
    if room >= needed:
        return
    each = f"{resources.cpus_per_worker} core(s){' and a GPU' if resources.gpus else ''} each"
    there = ", ".join(f"{node.address} with {node.cpus} core(s) and {node.gpus} GPU(s)" for node in nodes[:5])
    short = f"the run needs room for {needed} worker(s) of {each}, and there is room for {room} now ({there})"
    if not on_cluster():
        raise ValueError(f"{short}: use fewer --workers, --cpus-per-worker or --no-gpus")
    print(f"waiting for the cluster to grow: {short}", flush=True)
