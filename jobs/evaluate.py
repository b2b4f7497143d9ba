r"""Top-1 and top-5 validation error of a checkpoint, by the center crop or the paper's ten crops, each image once.

    python jobs/evaluate.py --data SHARDS --checkpoint RUNS/first --ten-crop

Started plainly, it uses one device of this machine. With --workers, it uses the cluster:

    ray job submit --working-dir . -- python jobs/evaluate.py --data s3://BUCKET/shards --stage /mnt/nvme \
        --checkpoint s3://BUCKET/runs/first --workers 8 --gpus
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jobs.cli.command import GpuChoice, run
from jobs.cli.cores import cores


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    data: str
    """The shard set with the validation images: a folder (with --workers, one that every node sees) or a URL."""
    checkpoint: str
    """A checkpoint_* folder, or a run's folder (its best checkpoint); a local path or a URL (s3://, gs://)."""
    stage: str | None = None
    """A folder on each node's own disk to copy the validation images to, unless a run has staged the set there."""
    stage_as: Literal["jpeg", "pixels"] = "jpeg"
    """As the run's; pixels: the whole set is decoded there."""
    ten_crop: bool = False
    """Average the softmax over the four corners, the center and their mirror images (the paper, section 4.1)."""
    json: Path | None = None
    """Also write the result to this file."""
    workers: int | None = None
    """Share the images among so many Ray tasks; None: use this process alone, without Ray."""
    gpu: GpuChoice = None
    """Use a GPU each; None: if there is any."""
    batch_size: int = 100
    """Images at a time; with --ten-crop each is seen ten times."""
    threads: Annotated[int | None, tyro.conf.arg(aliases=("--cpus-per-worker",))] = None
    """Decoder threads, and with --workers the cores of each; None: all cores, shared evenly."""

    def __post_init__(self) -> None:
        for flag, value in (("batch-size", self.batch_size), ("threads", self.threads), ("workers", self.workers)):
            if value is not None and value < 1:
                raise ValueError(f"--{flag} is {value}; it must be at least 1")

    @property
    def crops(self) -> int:
        """Of each image."""
        return 10 if self.ten_crop else 1


if __name__ == "__main__":
    run(EvaluateConfig, "jobs.evaluate")  # Before the imports below, which take seconds.

import numpy as np
import ray
import torch
from torch import Tensor

from jobs.cli.device import choose_device
from jobs.cli.locations import check_parent
from jobs.cli.progress import counted
from jobs.cli.workers import Workers
from jobs.cluster.connection import connected, in_parallel
from jobs.cluster.nodes import alive_nodes
from jobs.cluster.paths import with_whole_paths
from jobs.training import checkpoint
from jobs.training.config import HardwareOptions
from jobs.training.data import local_set
from jobs.training.resources import Resources, check_shortage
from jobs.training.run_state import RunFingerprint
from jobs.training.run_storage import local_checkpoint
from jobs.training.worker import make_network, prepare_torch
from model.alexnet import AlexNet
from model.metrics import Score, evaluate
from pipeline.dataset.info import is_decoded, read_dataset, write_json
from pipeline.dataset.split_reader import SplitReader
from pipeline.images.rgb_stats import RgbStatistics
from pipeline.loading.loader import Loader
from pipeline.loading.plan import center_crops, rank_slice
from pipeline.storage.locations import is_url, shown


def main(config: EvaluateConfig) -> None:
    config = with_whole_paths(config, "data", "checkpoint", "stage", "json")
    if is_url(config.data) and config.stage is None:
        raise ValueError("--data is a URL: add --stage FOLDER, on each node's own disk, to copy its images to")
    if config.json:
        check_parent("--json", config.json)
    with local_checkpoint(config.checkpoint) as (location, folder):
        state = checkpoint.read_state(folder)
        checkpoint.check_other_classes(state.identity, read_dataset(config.data), location, config.data)
        network = make_network(state.identity)
        checkpoint.load_network(folder, network)
    started = time.perf_counter()
    if config.workers is None:
        sums = judge(config, state.identity.rgb, network, config.gpu, config.threads or cores())
    else:
        sums = judge_in_tasks(config, state.identity, network, config.workers)
    score = Score.of(sums)
    where, kind = shown(location), "ten crops" if config.ten_crop else "center crop"
    if state.origin:
        print(f"{where} is {state.origin}")
    print(f"{where}, {kind}, {score.images} images in {time.perf_counter() - started:.0f} s")
    print(f"top-1 error {score.top1_error:.2%}, top-5 error {score.top5_error:.2%}, loss {score.loss:.4f}")
    if config.json is not None:
        found = {**dataclasses.asdict(score), "crops": config.crops, "checkpoint": where, "data": shown(config.data)}
        write_json(config.json, {**found, "origin": state.origin} if state.origin else found)


def judge_in_tasks(config: EvaluateConfig, identity: RunFingerprint, network: AlexNet, workers: int) -> Tensor:
    """`judge` of every part, each in a Ray task; the sums over all.

    Raises:
        ValueError: if a Ray of this machine alone has no room for so many, or no GPU.
    """
    with connected():
        nodes = alive_nodes()
        options = HardwareOptions(Workers(workers, workers), gpus=config.gpu, cpus_per_worker=config.threads)
        resources = Resources.of(options, nodes)
        check_shortage(resources, nodes)
        threads, gpus = resources.cpus_per_worker, resources.gpus
        reference = ray.put(network)  # So that it goes to a node once, not with each task.
        calls = [(config, identity.rgb, reference, gpus, threads, rank, workers) for rank in range(workers)]
        # By rank: a task that is made again may answer twice.
        parts = dict(in_parallel(judge, calls, workers, num_cpus=threads, num_gpus=int(gpus)))
    return torch.stack([parts[rank] for rank in range(workers)]).sum(dim=0)


def judge(
    config: EvaluateConfig,
    rgb: RgbStatistics,
    network: AlexNet,
    gpus: bool | None,
    threads: int,
    rank: int = 0,
    world: int = 1,
) -> Tensor:
    """Judges a network on one part of the validation images: `model.metrics.evaluate`'s sums, on the CPU.

    Args:
        rgb: the training run's: its mean is part of what was learned.
    """
    device = choose_device(gpus)
    prepare_torch(device, threads)
    folder = local_set(config.data, config.stage, config.stage_as, threads, ("val",))
    # A decoded cache has an index of its own; what is staged of one split has no description.
    reader = SplitReader(folder, read_dataset(folder if is_decoded(folder) else config.data), "val")
    # Whole batches, so that each is the same for any number of workers, and with it its sums.
    size = config.batch_size
    part = rank_slice(-(-len(reader) // size), rank, world)
    samples = np.arange(part.start * size, min(part.stop * size, len(reader)))
    loader = Loader(reader, rgb, size, device, threads, ten_crop=config.ten_crop)
    batches = counted(loader.run(center_crops(samples).chunks(size)), len(samples))
    return evaluate(network.to(memory_format=torch.channels_last).to(device), batches, device, config.crops).cpu()
