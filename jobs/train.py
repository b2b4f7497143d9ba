"""Trains AlexNet on a shard set, on any number of workers, as the paper did (or by a named deviation).

Run the same command again to continue a run that was stopped. Started plainly, it uses this machine; under
`ray job submit --working-dir . -- python jobs/train.py ...` it uses the cluster. A setting whose default is None
follows from the recipe or from the machine; the run begins by printing what came of it.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, Literal

import ray
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError

from jobs import checkpoint
from jobs.backend import NodeTorchConfig
from jobs.checkpoint import Identity
from jobs.cli import GpuChoice, run
from jobs.cluster import connected
from jobs.interrupt import SigtermInWorkers, sigterm_stops
from jobs.keeping import Keeper, StorageError, mend_list, storage_error
from jobs.ledger import LedgerError, prove
from jobs.nodes import alive_nodes, refuse_unshared
from jobs.skipped import summary
from jobs.trackers import refuse_missing
from jobs.worker import Assignment, train_worker
from model.recipe import RECIPES, Recipe
from pipeline.dataset import DATASET_FILE, DatasetError, DatasetInfo, read_dataset
from pipeline.plan import Plan, colour_matrix
from pipeline.staging import read_remote_dataset
from pipeline.storage import is_url, join, open_location

HANG_SECONDS = "120"
MOST_CORES = 12  # Of a GPU worker by default: decoding 256 x 256 JPEGs for one GPU's AlexNet gains little beyond.


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings whose default is None follow from the recipe or from the machine; the run prints what they became."""

    data: str
    """The shard set, made by jobs/shard_imagenet.py: a folder (on a cluster, one that every node sees) or a URL."""
    storage: str
    """Where runs are kept: a folder, or a URL that every node can write (s3://, gs://)."""
    name: str
    """The run's name: its checkpoints and events are in STORAGE/NAME."""
    stage: str | None = None
    """A folder on each node's own disk to copy the set to, once per node: for a URL or a slow mount."""
    stage_as: Literal["jpeg", "pixels"] = "jpeg"
    """What to keep there: the JPEGs, or their pixels, decoded once, so that an epoch only cuts, mirrors and
    shifts. Pixels take 196,608 bytes an image, 252 GB for ImageNet: for memory or fast disks that hold so much."""
    recipe: Literal["default", "paper", "large-batch", "batchnorm"] = "default"
    """paper: to the letter; default: but for an initial hidden bias of 0.1, with which it learns reliably; large-batch:
    LARS, for thousands of images a step; batchnorm: batch normalisation for LRN. model/recipe.py has each in full."""
    workers: int | None = None
    """How many processes train: one per GPU of the cluster, or one on CPU."""
    gpus: GpuChoice = None
    """Train on GPUs, or on CPU; None: on GPUs if the cluster has any."""
    batch_size: int | None = None
    """Images per step over all workers."""
    epochs: int | None = None
    """Stop after so many, if the schedule has not stopped before."""
    lr: float | None = None
    """Learning rate at the start."""
    weight_decay: float | None = None
    """Of the weights, and by `biases` of the biases."""
    biases: Literal["paper", "caffe"] | None = None
    """paper: as the weights; caffe: twice their rate and no decay."""
    optimizer: Literal["sgd", "lars"] | None = None
    """sgd: the paper's update; lars: with a rate scaled for each layer."""
    schedule: Literal["plateau", "poly"] | None = None
    """plateau: a tenth of the rate when validation stops improving; poly: falling over all epochs."""
    warm_up_epochs: int | None = None
    """Epochs over which the rate rises linearly at the start."""
    normalisation: Literal["lrn", "caffe", "caffenet", "batch"] | None = None
    """lrn: the paper's; caffe, caffenet: as the two networks of Caffe; batch: batch normalisation instead."""
    dropout: float | None = None
    """On the outputs of fc6 and fc7."""
    hidden_bias: float | None = None
    """Initial bias of conv2, conv4, conv5, fc6 and fc7."""
    groups: Literal[1, 2] | None = None
    """1: one tower; 2: the paper's two."""
    colour: Literal["eigenvalue", "std", "none"] | None = None
    """Scale of the colour shift: by the paper's eigenvalues, or by the 2012 source's standard deviations."""
    plateau_metric: Literal["top1_error", "loss"] | None = None
    """What must improve on the validation set, or the rate drops."""
    patience: int | None = None
    """Epochs without an improvement before the rate drops."""
    seed: int | None = None
    """Of weights, plan and dropout."""
    micro_batch: int = 1024
    """At most this many images per worker are in the network at once; a larger part is accumulated."""
    cpus_per_worker: int | None = None
    """Cores of each worker: the cluster's, shared evenly."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast on GPU, float32 on CPU."""
    tracker: Literal["mlflow", "wandb"] | None = None
    """Send metrics to MLflow (at MLFLOW_TRACKING_URI) or Weights & Biases (by WANDB_API_KEY) as well as to
    TensorBoard's events."""
    log_every: int = 20
    """Steps between progress lines."""
    checkpoint_every: int = 0
    """Steps between checkpoints within an epoch, besides the one at its end."""
    checkpoint_minutes: float | None = None
    """Minutes between checkpoints within an epoch, besides the others."""
    keep: int = 2
    """How many checkpoints to keep besides the newest: those with the lowest validation error."""
    skip_corrupt: bool = False
    """Take the next image of the epoch for one that is corrupt, and list it in STORAGE/NAME/skipped; else stop."""
    max_failures: int = 3
    """How often to start again from the last checkpoint after losing a worker or a node."""

    def __post_init__(self) -> None:
        for field in ("workers", "micro_batch", "cpus_per_worker", "log_every", "keep"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"--{field.replace('_', '-')} is {value}; it must be at least 1")
        for field in ("checkpoint_every", "max_failures"):
            if getattr(self, field) < 0:
                raise ValueError(f"--{field.replace('_', '-')} is {getattr(self, field)}; it must not be below 0")
        if self.stage_as == "pixels" and self.stage is None:
            raise ValueError("--stage-as pixels needs --stage, a folder on each node's own disk")
        if self.stage_as == "pixels" and self.skip_corrupt:
            raise ValueError("--skip-corrupt is for JPEGs; leave it out: --stage-as pixels decodes each image first")
        if self.checkpoint_minutes is not None and not self.checkpoint_minutes > 0:
            raise ValueError(f"--checkpoint-minutes is {self.checkpoint_minutes}; it must be above 0")
        if not self.name or self.name.startswith(".") or "/" in self.name:
            raise ValueError(f"--name is {self.name!r}; it names a folder in --storage, so it must be a plain word")

    def make_recipe(self) -> Recipe:
        """The named recipe with what the command line changes.

        Raises:
            ValueError: if it changes what the recipe's schedule does not ask.
        """
        recipe = dataclasses.replace(RECIPES[self.recipe], **self.changes())
        if recipe.schedule != "plateau":
            idle = [name for name in ("plateau_metric", "patience") if getattr(self, name) is not None]
            if idle:
                flag = f"--{idle[0].replace('_', '-')}"
                raise ValueError(f"{flag} does nothing under the {recipe.schedule} schedule: leave it out")
        return recipe

    def changes(self) -> dict[str, Any]:
        """The fields of the recipe that the command line sets."""
        given = {f.name: getattr(self, f.name, None) for f in dataclasses.fields(Recipe)}
        return {name: value for name, value in given.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Resources:
    """What the run gets of the cluster."""

    workers: int
    gpus: bool
    cpus_per_worker: int

    @classmethod
    def of(cls, config: TrainConfig, cluster: dict[str, float]) -> Resources:
        """Settles what the command line leaves open.

        Args:
            config: the command line.
            cluster: Ray's cluster resources, "CPU" and "GPU".
        """
        gpus = config.gpus if config.gpus is not None else cluster.get("GPU", 0) > 0
        workers = config.workers or (max(int(cluster.get("GPU", 0)), 1) if gpus else 1)
        share = max(int(cluster.get("CPU", 0)) // workers, 1)
        return cls(workers, gpus, config.cpus_per_worker or (min(share, MOST_CORES) if gpus else share))


def check_storage(storage: str, name: str) -> None:
    """Writes and removes a file in the run's folder, so that an hour of training is not lost to a missing permission.

    Raises:
        ValueError: if that fails.
    """
    filesystem, path = open_location(storage)
    probe = f"{path}/{name}/.writable"
    try:
        filesystem.create_dir(f"{path}/{name}", recursive=True)
        with filesystem.open_output_stream(probe) as stream:
            stream.write(b"ok")
        filesystem.delete_file(probe)
    except OSError as error:
        raise ValueError(f"the storage {storage} cannot be written ({error}): give another --storage") from error


def main(config: TrainConfig) -> None:
    recipe = config.make_recipe()
    data, info = open_dataset(config)
    plan = Plan(info.splits["train"].samples, recipe.batch_size, recipe.seed, colour_matrix(info.rgb, recipe.colour))
    refuse_missing(config.tracker)
    check_storage(config.storage, config.name)
    run_location = join(config.storage, config.name)
    if mended := mend_list(run_location):
        print(mended, flush=True)
    done = checkpoint.committed(run_location)
    if done:
        folder, state = list(done.items())[-1]
        checkpoint.refuse_other(state, Identity.of(recipe, info), join(run_location, folder))
        if checkpoint.finished(state, recipe):
            print(f"the run {config.name} is finished already; --epochs extends it, another --name starts anew")
            print_result(data, run_location, state.progress.history, plan)
            return
    with connected():
        resources = Resources.of(config, ray.cluster_resources())
        refuse_shortage(resources, recipe)
        refuse_local_paths(config)
        changed = "".join(f", {name} {value}" for name, value in config.changes().items())
        precision = config.precision if config.precision != "auto" else ("bfloat16" if resources.gpus else "float32")
        print(
            f"{'continuing' if done else 'starting'} run {config.name}: recipe {config.recipe}{changed}, "
            f"{len(info.classes)} classes; an epoch is {plan.steps} steps of {recipe.batch_size} and leaves out "
            f"{plan.left_out} of {plan.samples} images; {resources.workers} worker(s) on "
            f"{'GPU' if resources.gpus else 'CPU'} with {resources.cpus_per_worker} core(s) each; {precision}",
            flush=True,
        )
        history = launch(config, recipe, data, resources, precision)
    print_result(data, run_location, history, plan)


def open_dataset(config: TrainConfig) -> tuple[str, DatasetInfo]:
    """The shard set's location, as every node can use it, and its description.

    Raises:
        DatasetError: if it cannot be trained on and validated with.
    """
    if is_url(config.data) and config.stage is None:
        raise DatasetError(f"--data is {config.data}: give a folder on each node's own disk to copy it to with --stage")
    location = config.data if is_url(config.data) else os.path.abspath(config.data)
    info = read_remote_dataset(location) if is_url(location) else read_dataset(Path(location))
    for split in ("train", "val"):
        if split not in info.splits or info.splits[split].samples == 0:
            raise DatasetError(f"the set {location} has no {split} images; shard with --source-val or --val-fraction")
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
    assignment = Assignment(
        data=data,
        stage=config.stage,
        stage_as=config.stage_as,
        run=run_location,
        tracker=config.tracker,
        recipe=recipe,
        micro_batch=min(config.micro_batch, -(-recipe.batch_size // resources.workers)),
        threads=resources.cpus_per_worker,
        precision=precision,
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        skips=run_location if config.skip_corrupt else None,
        checkpoint_seconds=None if config.checkpoint_minutes is None else 60 * config.checkpoint_minutes,
    )
    # Ray Train would show what a worker prints twice, once through its own log.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    # A worker that does not answer for so long counts as dead; Ray's own default is 600.
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", HANG_SECONDS)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=assignment,
        torch_config=NodeTorchConfig(),
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus,
            resources_per_worker={"CPU": resources.cpus_per_worker, **({"GPU": 1} if resources.gpus else {})},
        ),
        run_config=RunConfig(
            name=config.name,
            storage_path=path,
            storage_filesystem=filesystem,
            callbacks=[StopOnDamage(), Keeper(run_location, config.max_failures), SigtermInWorkers()],
            logging_config=LoggingConfig("WARNING"),  # at INFO, every report of every worker is a line
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=config.keep, checkpoint_score_attribute="top1_error", checkpoint_score_order="min"
            ),
        ),
    )
    try:
        with sigterm_stops():
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


def refuse_shortage(resources: Resources, recipe: Recipe) -> None:
    """Raises ValueError for what could never start: more workers than images in a batch, or than this machine holds."""
    if resources.workers > recipe.batch_size:
        raise ValueError(
            f"{resources.workers} workers cannot share a batch of {recipe.batch_size}: use fewer --workers or a larger "
            "--batch-size"
        )
    have = ray.cluster_resources()
    need = {"CPU": resources.workers * resources.cpus_per_worker, "GPU": resources.workers * resources.gpus}
    short = [f"{n} {kind}(s), there are {have.get(kind, 0):g}" for kind, n in need.items() if have.get(kind, 0) < n]
    if short and not os.environ.get("RAY_ADDRESS"):
        raise ValueError(f"the run needs {' and '.join(short)}: use fewer --workers, --cpus-per-worker or --no-gpus")
    if short:
        print(f"waiting for the cluster to grow: the run needs {' and '.join(short)} now", flush=True)


def refuse_local_paths(config: TrainConfig) -> None:
    """Raises ValueError if some node of the cluster does not see a local --storage or --data as this one does."""
    if len(alive_nodes()) < 2:
        return
    mount = "a folder of the same path on a mount that all nodes have"
    if not is_url(config.storage):
        folder = os.path.abspath(os.path.join(config.storage, config.name))
        refuse_unshared("--storage", folder, f"give a URL (s3://, gs://) or {mount}")
    if not is_url(config.data):
        # --stage copies on each node from --data, which therefore must be seen there, too.
        cure = f"copy the set to an object store and give its URL and --stage, or give {mount}"
        refuse_unshared("--data", os.path.abspath(config.data), cure, marker=DATASET_FILE)


def ledger_line(run: str, plan: Plan) -> str:
    """Whether each step was trained on the plan's samples, once, in words."""
    try:
        proof = prove(run, plan)
    except LedgerError as error:
        # The weights are what they are; whoever relies on exactly-once must know.
        return f"sample ledger: NOT proved: {error}"
    return f"sample ledger: {proof.epochs} epochs, {proof.steps} steps, each with the plan's samples, once"


def print_result(data: str, run: str, history: list[dict[str, float]], plan: Plan) -> None:
    lowest = min(history, key=lambda row: row["top1_error"])
    print(
        f"done: {len(history)} epochs; lowest validation error {lowest['top1_error']:.1%} top-1, "
        f"{lowest['top5_error']:.1%} top-5, after epoch {lowest['epoch']}"
    )
    if skipped := summary(run, data):
        print(skipped)
    else:
        # With substitutes, an epoch is another than the plan's on purpose.
        print(ledger_line(run, plan))
    print(f"best checkpoint: {join(run, str(checkpoint.best(checkpoint.committed(run))))}")
    print(f"next: python jobs/evaluate.py --data {data} --checkpoint {run} --ten-crop")


if __name__ == "__main__":
    run(TrainConfig, main)
