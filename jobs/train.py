"""Trains AlexNet on a shard set, on any number of workers, as the paper did (or by a named deviation).

Ctrl-C or SIGTERM writes a checkpoint and leaves; the same command continues any run that was stopped. Started plainly,
it uses this machine; under `ray job submit --working-dir . -- python jobs/train.py ...` it uses the cluster. A setting
whose default is None follows from the recipe or from the machine; the run begins by printing what came of it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from ray.train import (
    CheckpointConfig,
    ControllerError,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    UserCallback,
)

from jobs.cli.command import run
from jobs.cluster.connection import connected, on_cluster
from jobs.cluster.nodes import Node, alive_nodes, check_shared
from jobs.diagnostics.checks import remove_file, write_file
from jobs.training import checkpoint
from jobs.training.backend import NodeTorchConfig, NodeTrainer
from jobs.training.checkpoint import RunFingerprint
from jobs.training.config import TrainConfig, Workers
from jobs.training.run_storage import FailureReporter, StorageError, repair_checkpoint_list, storage_error
from jobs.training.stop_signals import clear_stop_request, signals_stop
from jobs.training.trackers import check_installed
from jobs.training.worker import WorkerConfig, train_worker
from model.recipe import Recipe
from pipeline.dataset.info import DATASET_FILE, DatasetError, DatasetInfo, is_decoded, read_dataset
from pipeline.loading.graph import decoder_name
from pipeline.loading.plan import Plan, color_matrix
from pipeline.storage.locations import is_url, join, on_disk, open_location, shown

ROOM_SECONDS = "20"
MOST_CORES = 12  # Of a GPU worker by default: decoding 256 x 256 JPEGs for one GPU's AlexNet gains little beyond.


@dataclasses.dataclass(frozen=True)
class Resources:
    """What the run gets of the cluster."""

    workers: Workers
    gpus: bool
    cpus_per_worker: int

    @classmethod
    def of(cls, config: TrainConfig, nodes: Sequence[Node]) -> Resources:
        """Settles what the command line leaves open.

        Args:
            config: the command line.
            nodes: those that are there now; others may come.

        Raises:
            ValueError: if the cores of a worker cannot be told, as no node with a GPU is there yet.
        """
        found = sum(node.gpus for node in nodes)
        gpus = config.gpus if config.gpus is not None else found > 0
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

    def room(self, nodes: Sequence[Node]) -> int:
        """How many of these workers the nodes have room for, each worker on one node."""
        return _room(nodes, self.cpus_per_worker, self.gpus)


def _room(nodes: Sequence[Node], cores: int, gpus: bool) -> int:
    return sum(min(node.cpus // cores, node.gpus) if gpus else node.cpus // cores for node in nodes)


def _most_cores(nodes: Sequence[Node], workers: int, gpus: bool) -> int:
    """The most cores that each of so many workers can have, none spread over nodes; 0 if there is no room for all."""
    most = max((node.cpus for node in nodes), default=0)
    return next((cores for cores in range(most, 0, -1) if _room(nodes, cores, gpus) >= workers), 0)


def check_storage(storage: str, name: str) -> None:
    """Writes and removes a file in the run's folder, so that an hour of training is not lost to a missing permission.

    Raises:
        ValueError: if that fails.
    """
    run = join(storage, name)
    try:
        write_file(run, ".writable")
        remove_file(run, ".writable")
    except OSError as error:
        raise ValueError(f"the storage {storage} cannot be written ({error}): give another --storage") from error


def main(config: TrainConfig) -> None:
    recipe = config.make_recipe()
    data, info = open_dataset(config)
    plan = Plan(info.splits["train"].samples, recipe.batch_size, recipe.seed, color_matrix(info.rgb, recipe.color))
    check_installed(config.tracker)
    check_storage(config.storage, config.name)
    run_location = join(config.storage, config.name)
    if repaired := repair_checkpoint_list(run_location):
        print(repaired, flush=True)
    done = checkpoint.committed(run_location)
    if done:
        folder, state = list(done.items())[-1]
        # Whether there are GPUs, which decide decoder and precision, is known later.
        own = RunFingerprint.of(recipe, info, state.identity.decoder, state.identity.precision)
        checkpoint.check_other(state, own, join(run_location, folder))
        if checkpoint.finished(state, recipe):
            print(f"the run {config.name} is finished already; --epochs extends it, another --name starts anew")
            print_result(data, run_location, state.progress.history)
            return
    with connected():
        nodes = alive_nodes()
        resources = Resources.of(config, nodes)
        check_shortage(resources, nodes, recipe)
        if recipe.normalization == "batch":
            resources.workers.check_single_images(recipe.batch_size, config.micro_batch)
        check_local_paths(config)
        changed = "".join(f", {name} {value}" for name, value in config.changes().items())
        precision = config.precision if config.precision != "auto" else ("bfloat16" if resources.gpus else "float32")
        pixels = config.stage_as == "pixels" or (config.stage is None and is_decoded(Path(data)))
        decoder = decoder_name(pixels, resources.gpus, config.gpu_decoder)
        if done:
            own = RunFingerprint.of(recipe, info, decoder, precision)
            checkpoint.check_other(state, own, join(run_location, folder))
        print(
            f"{'continuing' if done else 'starting'} run {config.name}: recipe {config.recipe}{changed}, "
            f"{len(info.classes)} classes; an epoch is {plan.steps} steps of {recipe.batch_size} and leaves out "
            f"{plan.dropped} of {plan.samples} images; {_counted(resources.workers)} on "
            f"{'GPU' if resources.gpus else 'CPU'} with {resources.cpus_per_worker} core(s) each; {precision}; "
            f"JPEGs decoded by {decoder}",
            flush=True,
        )
        history = launch(config, recipe, data, resources, precision)
    print_result(data, run_location, history)


def open_dataset(config: TrainConfig) -> tuple[str, DatasetInfo]:
    """The shard set's location, as every node can use it, and its description.

    Raises:
        DatasetError: if it cannot be trained on and validated with.
    """
    if is_url(config.data) and config.stage is None:
        raise DatasetError(f"--data is {config.data}: give a folder on each node's own disk to copy it to with --stage")
    location = config.data if is_url(config.data) else os.path.abspath(config.data)
    info = read_dataset(location)
    for split in ("train", "val"):
        if split not in info.splits or info.splits[split].samples == 0:
            raise DatasetError(
                f"the set {shown(location)} has no {split} images; shard with --source-val or --val-fraction"
            )
    return location, info


class StopOnDamage(UserCallback):
    """Ends a run whose data are damaged, where Ray Train would start it again to meet the same damage."""

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if isinstance(error, DatasetError):
                # An error of the controller's is not retried; the workers that wait for the failed one are ended.
                raise ControllerError(error)


def launch(
    config: TrainConfig, recipe: Recipe, data: str, resources: Resources, precision: str
) -> list[dict[str, float]]:
    """Runs the workers to the end; rank 0's history.

    Raises:
        ValueError: if training failed; it says why.
    """
    filesystem, path = open_location(config.storage)
    run_location = join(config.storage, config.name)
    workers = resources.workers
    assignment = WorkerConfig(
        data=data,
        stage=config.stage,
        stage_as=config.stage_as,
        run=run_location,
        tracker=config.tracker,
        recipe=recipe,
        micro_batch=min(config.micro_batch, -(-recipe.batch_size // workers.min_workers)),
        threads=resources.cpus_per_worker,
        precision=precision,
        gpu_decoder=config.gpu_decoder,
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        checkpoint_seconds=None if config.checkpoint_minutes is None else 60 * config.checkpoint_minutes,
        hang_seconds=config.hang_seconds,
    )
    # Ray Train would show what a worker prints twice, once through its own log.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    # A worker that does not answer for so long counts as dead; Ray's own default is 600.
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(config.hang_seconds))
    if workers.elastic:
        # Ray Train learns of a lost node after up to 20 s; till then it waits for that node's room, 60 s by default.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", ROOM_SECONDS)
    if not on_cluster():
        # No node of a Ray that was started for this run is taken away: one actor less, at each start and all the time.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    trainer = NodeTrainer(
        train_worker,
        train_loop_config=assignment,
        torch_config=NodeTorchConfig(run=run_location),
        scaling_config=ScalingConfig(
            num_workers=(workers.min_workers, workers.max_workers) if workers.elastic else workers.max_workers,
            elastic_resize_monitor_interval_s=config.resize_seconds,
            use_gpu=resources.gpus,
            resources_per_worker={"CPU": resources.cpus_per_worker, **({"GPU": 1} if resources.gpus else {})},
        ),
        run_config=RunConfig(
            name=config.name,
            storage_path=path,
            storage_filesystem=filesystem,
            callbacks=[StopOnDamage(), FailureReporter(run_location, config.max_failures)],
            logging_config=LoggingConfig("WARNING"),  # at INFO, every report of every worker is a line
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=config.keep, checkpoint_score_attribute="top1_error", checkpoint_score_order="min"
            ),
        ),
    )
    clear_stop_request(run_location)
    try:
        with signals_stop(run_location):
            outcome = trainer.fit().return_value
    except TrainingFailedError as error:
        cause = error.controller_failure if isinstance(error, ControllerError) else None
        if isinstance(cause, StorageError | DatasetError):
            raise cause from None
        if isinstance(cause, OSError):
            raise storage_error(run_location, cause) from error
        raise ValueError(f"training failed: {error}; the same command continues from the last checkpoint") from error
    if outcome["stopped"]:
        raise ValueError(f"stopped {outcome['stopped']}, with a checkpoint: run the same command again to continue")
    if outcome["error"]:
        kept = list(checkpoint.committed(run_location))
        raise ValueError(
            f"{outcome['error']}; the last good checkpoint is {join(run_location, kept[-1]) if kept else 'none'}"
        )
    return list(outcome["history"])


def check_shortage(resources: Resources, nodes: Sequence[Node], recipe: Recipe) -> None:
    """Raises ValueError for what could never start: more workers than images in a batch, or than this machine holds."""
    resources.workers.check_more_than(recipe.batch_size)
    room, needed = resources.room(nodes), resources.workers.min_workers
    if room >= needed:
        return
    each = f"{resources.cpus_per_worker} core(s){' and a GPU' if resources.gpus else ''} each"
    there = ", ".join(f"{node.address} with {node.cpus} core(s) and {node.gpus} GPU(s)" for node in nodes[:5])
    short = f"the run needs room for {needed} worker(s) of {each}, and there is room for {room} now ({there})"
    if not on_cluster():
        raise ValueError(f"{short}: use fewer --workers, --cpus-per-worker or --no-gpus")
    print(f"waiting for the cluster to grow: {short}", flush=True)


def _counted(workers: Workers) -> str:
    return (
        f"{workers.min_workers} to {workers.max_workers} workers"
        if workers.elastic
        else f"{workers.max_workers} worker(s)"
    )


def check_local_paths(config: TrainConfig) -> None:
    """Raises ValueError if some node of the cluster does not see a local --storage or --data as this one does."""
    if len(alive_nodes()) < 2:
        return
    mount = "a folder of the same path on a mount that all nodes have"
    if not is_url(config.storage):
        folder = os.path.abspath(os.path.join(config.storage, config.name))
        check_shared("--storage", folder, f"give a URL (s3://, gs://) or {mount}")
    if not is_url(config.data):
        # --stage copies on each node from --data, which therefore must be seen there, too.
        cure = f"copy the set to an object store and give its URL and --stage, or give {mount}"
        check_shared("--data", os.path.abspath(config.data), cure, marker=DATASET_FILE)


def print_result(data: str, run: str, history: list[dict[str, float]]) -> None:
    lowest = min(history, key=lambda row: row["top1_error"])
    print(
        f"done: {len(history)} epochs; lowest validation error {lowest['top1_error']:.1%} top-1, "
        f"{lowest['top5_error']:.1%} top-5, after epoch {lowest['epoch']}"
    )
    print(f"best checkpoint: {join(run, str(checkpoint.best(checkpoint.committed(run))))}")
    # A URL may have options, whose & a shell would take for its own.
    print(f"next: python jobs/evaluate.py --data {quote(on_disk(data))} --checkpoint {quote(run)} --ten-crop")


if __name__ == "__main__":
    run(TrainConfig, main)
