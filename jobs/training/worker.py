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
from ray.train.collective import barrier

from jobs.cli.device import processor
from jobs.training.config import TrainConfig
from jobs.training.data import WorkerData, local_set
from jobs.training.failures import PERMANENT, CollectiveTimeoutError, named_timeouts
from jobs.training.resume import resume
from jobs.training.run_state import RunFingerprint
from jobs.training.run_storage import CheckpointUploader, check_run_folder
from jobs.training.stop_signals import StopConsensus, StopRequestPoller
from jobs.training.trackers import BestEffort, End, TrackedRun, make_trackers
from jobs.training.watchdog import limited
from model.alexnet import AlexNet
from model.guards import DivergedError
from model.metrics import LabeledImages, Score
from model.training import StepAction, StoppedError, Trainer, Worker


class Reporter:
    """Tells a person and the trackers how training goes, and keeps checkpoints (`model.training.Observer`).

    Only rank 0 has any of these.
    """

    def __init__(
        self, config: TrainConfig, identity: RunFingerprint, worker: Worker, steps: int, trackers: list[BestEffort]
    ) -> None:
        self._identity, self._rank, self._steps, self._trackers = identity, worker.rank, steps, trackers
        self._epochs = identity.recipe.epochs
        log = functools.partial(print, flush=True)
        self._uploader = CheckpointUploader(config.run, config.keep) if worker.rank == 0 else None
        news = StopRequestPoller(config.run, log).news if worker.rank == 0 else lambda: (None, None)
        seconds = None if config.checkpoint_minutes is None else 60 * config.checkpoint_minutes
        self._consensus = StopConsensus(worker, seconds, news, log)

    def on_step_end(self, trainer: Trainer, batches: Sequence[LabeledImages], own_seconds: float) -> StepAction:
        if self._uploader is not None:
            self._uploader.check()
        return self._consensus.after_step(own_seconds)

    def on_validation_batch(self, trainer: Trainer) -> StepAction:
        if self._uploader is not None:
            self._uploader.check()
        return self._consensus.agree()

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
        if self._uploader is not None:
            self._uploader.wait()

    def close(self, end: End) -> None:
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

    def checkpoint(self, trainer: Trainer) -> None:
        if self._uploader is not None:
            self._uploader.save(trainer, self._identity)
        self._consensus.checkpointed()


def train_worker(config: TrainConfig) -> dict[str, Any]:
    """Trains on this worker; rank 0's return value reaches the driver.

    Args:
        config: the command line with nothing left open: `cpus_per_worker` and `precision` are settled.

    Returns:
        "error": why training stopped early, or None; "stopped": where, if it was told to stop, or None; "history": one
        row an epoch.

    Raises:
        CheckpointError, DatasetError: if the run's checkpoints or the set are missing or damaged.
        LocalDiskError, StorageError: if this node's disk or the storage cannot be written.
        CollectiveTimeoutError: if the others cannot be reached.
    """
    try:
        with named_timeouts(config.collective_seconds):
            return _train(config)
    except (*PERMANENT, CollectiveTimeoutError):
        # The driver says it in one line; Ray Train would print a traceback before.
        logging.getLogger("ray.train").setLevel(logging.CRITICAL)
        raise


def _train(config: TrainConfig) -> dict[str, Any]:
    recipe, threads = config.make_recipe(), config.cpus_per_worker
    assert threads is not None
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    worker = Worker(context.get_world_rank(), context.get_world_size(), device, getattr(torch, config.precision))
    prepare_torch(device, threads)
    check_run_folder(config.run)
    folder = local_set(config.data, config.stage, config.stage_as, threads)
    if config.stage is not None:
        # Without a time limit: a node that comes new copies all of the set.
        barrier()
    with limited(config.hang_seconds):
        data = WorkerData(folder, recipe, worker, config.micro_batch, threads, config.gpu_decoder, config.hang_seconds)
    identity = RunFingerprint.of(recipe, data.info, data.decoder, config.precision, config.init_from)
    trainer = Trainer(
        make_network(identity).to(memory_format=torch.channels_last).to(device),
        recipe,
        worker,
        config.log_every,
        config.checkpoint_every,
    )
    # Not Ray Train's: it knows of no checkpoint, so that none that is gone or damaged can keep it from starting.
    continued = resume(config.run, config.from_checkpoint, trainer, identity, config.init_from)
    start = trainer.progress.epoch * data.steps + trainer.progress.step
    trackers: list[BestEffort] = []
    if worker.rank == 0:
        tracked = TrackedRun(config.run, dataclasses.asdict(recipe), machine(config, worker), start)
        trackers = make_trackers(config.tracker, tracked)
    if continued and worker.rank == 0:
        place = f"after epoch {trainer.progress.epoch}, step {trainer.progress.step}"
        print(f"continuing {place}, with {worker.world} worker(s)", flush=True)
    reporter = Reporter(config, identity, worker, data.steps, trackers)
    error = stopped = None
    end: End = "failed"
    try:
        try:
            trainer.fit(data, reporter)
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


def prepare_torch(device: torch.device, threads: int) -> None:
    """Sets the network's threads on a CPU; on a GPU, chooses kernels that give the same bits each time, and in float32
    those that compute in it: convolutions would use TF32, matrix products do not."""
    if device.type == "cpu":
        torch.set_num_threads(threads)
    else:
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False


def machine(config: TrainConfig, worker: Worker) -> str:
    """What a run runs on, as its first worker sees it, for people."""
    if worker.device.type == "cuda":
        kind = torch.cuda.get_device_name(worker.device)
    else:
        kind = f"{processor()}, {config.cpus_per_worker} thread(s) each"
    return f"{worker.world} worker(s) on {kind}; {config.precision}; torch {torch.__version__}"


def make_network(identity: RunFingerprint) -> AlexNet:
    """A run's network with its initial weights, on the CPU."""
    recipe = identity.recipe
    network = AlexNet(len(identity.wnids), recipe.groups, recipe.dropout, recipe.normalization)
    network.initialize(recipe.seed, recipe.hidden_bias, recipe.initialization)
    return network
