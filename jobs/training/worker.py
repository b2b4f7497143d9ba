"""What each Ray Train worker runs: its part of the data, the network, the loop, and reports to whoever watches."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any

import ray.train
import ray.train.torch
import torch

from jobs.cli.device import processor
from jobs.training.data import WorkerData, local_set
from jobs.training.failures import PERMANENT
from jobs.training.resume import resume
from jobs.training.run_state import RunFingerprint
from jobs.training.run_storage import CheckpointUploader, check_run_folder
from jobs.training.stop_signals import StopConsensus, StopRequestPoller
from jobs.training.trackers import BestEffort, End, TrackedRun, make_trackers
from jobs.training.watchdog import LimitedData, limited
from model.alexnet import AlexNet
from model.guards import DivergedError
from model.metrics import LabeledImages, Score
from model.recipe import Recipe
from model.training import StepAction, StoppedError, Trainer, Worker
from pipeline.loading.graph import GpuDecoder


@dataclasses.dataclass(frozen=True)
class WorkerConfig:
    """What the driver tells every worker."""

    data: str
    """The shard set: an absolute path that every node sees, or a URL."""
    stage: str | None
    """Where to copy it to on this node, or None to use it where it is."""
    stage_as: str
    """jpeg or pixels: what the copy holds."""
    run: str
    """The run's folder, a local path or URL, where rank 0 puts checkpoints and TensorBoard's events."""
    start: str | None
    """The checkpoint from which a run begins that has none of its own, or None for initial weights."""
    keep: int
    """How many of the best checkpoints stay, besides the newest two."""
    tracker: str | None
    """mlflow or wandb, to send metrics there as well; or None."""
    recipe: Recipe
    micro_batch: int
    """At most this many images are in the network at once."""
    threads: int
    """Cores of one worker: decoder threads, and the network's threads on CPU."""
    precision: str
    """float32 or bfloat16."""
    gpu_decoder: GpuDecoder
    """Which of nvJPEG's decoders is used on a GPU."""
    log_every: int
    """Steps between progress lines."""
    checkpoint_every: int
    """Steps between checkpoints within an epoch; 0 for none."""
    checkpoint_seconds: float | None
    """Time between checkpoints within an epoch; None for none."""
    hang_seconds: float
    """How long a worker may take to open the set, or to get one step's images (`jobs.training.watchdog`)."""


class Reporter:
    """Tells a person and the trackers how training goes, and keeps checkpoints (`model.training.Observer`).

    Only rank 0 has any of these.
    """

    def __init__(
        self,
        config: WorkerConfig,
        identity: RunFingerprint,
        worker: Worker,
        steps: int,
        trackers: list[BestEffort],
    ) -> None:
        self._identity = identity
        self._rank = worker.rank
        log = functools.partial(print, flush=True)
        self._uploader = CheckpointUploader(config.run, config.keep) if worker.rank == 0 else None
        news = StopRequestPoller(config.run, log).news if worker.rank == 0 else lambda: (None, None)
        self._consensus = StopConsensus(worker, config.checkpoint_seconds, news, log)
        self._steps = steps
        self._epochs = config.recipe.epochs
        self._trackers = trackers

    def on_step_end(self, trainer: Trainer, batches: Sequence[LabeledImages], own_seconds: float) -> StepAction:
        if self._uploader is not None:
            self._uploader.check()
        return self._consensus.after_step(own_seconds)

    def on_log(self, trainer: Trainer, score: Score, images_per_s: float, data_wait: float) -> None:
        if self._rank != 0:
            return
        progress = trainer.progress
        left = (self._steps - progress.step) * trainer.recipe.batch_size / images_per_s
        print(
            f"epoch {progress.epoch + 1}/{self._epochs} step {progress.step}/{self._steps}: loss {score.loss:.3f}, "
            f"error {score.top1_error:.1%}, rate {progress.rate:g}, {images_per_s:.1f} images/s, "
            f"data wait {data_wait:.1%}, epoch ends in {left:.0f} s",
            flush=True,
        )
        values = {
            "train/loss": score.loss,
            "train/top1_error": score.top1_error,
            "train/images_per_s": images_per_s,
            "train/data_wait": data_wait,
            "train/lr": float(progress.rate or 0.0),
        }
        self._track(values, progress.epoch * self._steps + progress.step)

    def on_epoch_end(self, trainer: Trainer, row: dict[str, Any]) -> None:
        if self._rank != 0:
            return
        print(
            f"epoch {row['epoch']}/{self._epochs}: train loss {row['train_loss']:.3f}, error {row['train_error']:.1%}; "
            f"val loss {row['val_loss']:.3f}, error {row['top1_error']:.1%} top-1, {row['top5_error']:.1%} top-5 "
            f"({row['val_images']} images); rate {row['lr']:g}; {row['seconds']:.0f} s",
            flush=True,
        )
        if row["reason"]:
            print(row["reason"], flush=True)
        values = {f"val/{name.removeprefix('val_')}": row[name] for name in ("val_loss", "top1_error", "top5_error")}
        self._track(values, row["epoch"] * self._steps)
        for tracker in self._trackers:
            tracker.flush()

    def wait(self) -> None:
        """Until the last checkpoint is committed."""
        if self._uploader is not None:
            self._uploader.wait()

    def close(self, end: End) -> None:
        """At the end, well or not."""
        for tracker in self._trackers:
            tracker.close(end)
        if self._uploader is not None:
            self._uploader.close()

    def _track(self, values: dict[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.log(values, step)

    def on_warning(self, trainer: Trainer, warning: str) -> None:
        if self._rank == 0:
            print(warning, flush=True)

    def checkpoint(self, trainer: Trainer, row: dict[str, Any] | None) -> None:
        if self._uploader is not None:
            self._uploader.save(trainer, self._identity)
        self._consensus.checkpointed()


def train_worker(config: WorkerConfig) -> dict[str, Any]:
    """Trains on this worker; rank 0's return value reaches the driver.

    Returns:
        "error": why training stopped early, or None; "stopped": where, if it was told to stop, or None; "history": one
        row an epoch.

    Raises:
        CheckpointError, DatasetError: if the run's checkpoints or the set are missing or damaged.
        LocalDiskError, StorageError: if this node's disk or the storage cannot be written.
    """
    try:
        return _train(config)
    except PERMANENT:
        # The driver says it in one line; Ray Train would print a traceback before.
        logging.getLogger("ray.train").setLevel(logging.CRITICAL)
        raise


def _train(config: WorkerConfig) -> dict[str, Any]:
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    worker = Worker(context.get_world_rank(), context.get_world_size(), device, getattr(torch, config.precision))
    if device.type == "cpu":
        torch.set_num_threads(config.threads)
    check_run_folder(config.run)
    folder = local_set(config.data, config.stage, config.stage_as, config.threads)
    with limited(config.hang_seconds):
        data = WorkerData(folder, config.recipe, worker, config.micro_batch, config.threads, config.gpu_decoder)
    identity = RunFingerprint.of(config.recipe, data.info, data.decoder, config.precision)
    trainer = Trainer(
        make_network(identity).to(memory_format=torch.channels_last).to(device),
        config.recipe,
        worker,
        config.log_every,
        config.checkpoint_every,
    )
    # Not Ray Train's: it knows of no checkpoint, so that none that is gone or damaged can keep it from starting.
    continued = resume(config.run, config.start, trainer, identity)
    start = trainer.progress.epoch * data.steps + trainer.progress.step
    trackers: list[BestEffort] = []
    if worker.rank == 0:
        tracked = TrackedRun(config.run, dataclasses.asdict(config.recipe), machine(config, worker), start)
        trackers = make_trackers(config.tracker, tracked)
    if continued and worker.rank == 0:
        place = f"after epoch {trainer.progress.epoch}, step {trainer.progress.step}"
        print(f"continuing {place}, with {worker.world} worker(s)", flush=True)
    reporter = Reporter(config, identity, worker, data.steps, trackers)
    error = stopped = None
    end: End = "failed"
    try:
        try:
            trainer.fit(LimitedData(data, config.hang_seconds), reporter)
        except DivergedError as failure:
            # All workers stop here. A new start would end the same way, so this is a result and no failure to retry.
            error = str(failure)
        except StoppedError as failure:
            stopped = str(failure)
        reporter.wait()
        end = "stopped" if stopped else "failed" if error else "finished"
    finally:
        reporter.close(end)
    return {"error": error, "stopped": stopped, "history": trainer.progress.history}


def machine(config: WorkerConfig, worker: Worker) -> str:
    """What a run runs on, as its first worker sees it, for people."""
    if worker.device.type == "cuda":
        kind = torch.cuda.get_device_name(worker.device)
    else:
        kind = f"{processor()}, {config.threads} thread(s) each"
    return f"{worker.world} worker(s) on {kind}; {config.precision}; torch {torch.__version__}"


def make_network(identity: RunFingerprint) -> AlexNet:
    """A run's network with its initial weights, on the CPU."""
    recipe = identity.recipe
    network = AlexNet(len(identity.wnids), recipe.groups, recipe.dropout, recipe.normalization)
    network.initialize(recipe.seed, recipe.hidden_bias, recipe.initialization)
    return network
