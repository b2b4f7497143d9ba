"""Trains AlexNet on a shard set, on any number of workers, as the paper did (or by a named deviation).

    python jobs/train.py --data SHARDS --storage RUNS --name first

Ctrl-C, SIGTERM or a hangup writes a checkpoint and leaves; the same command continues any run that was stopped. Started
plainly, it uses this machine; under `ray job submit --working-dir . -- python jobs/train.py ...` it uses the cluster.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import socket
import sys
import uuid
from pathlib import Path
from shlex import join as shell_line

from jobs.cli.command import one_line, run
from jobs.training.config import TrainConfig, from_groups

if __name__ == "__main__":
    run(from_groups, "jobs.train")  # Before the imports below, which take seconds.

from ray.exceptions import RayError
from ray.train import ControllerError, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError

from jobs.cluster.connection import connected, on_cluster
from jobs.cluster.nodes import NoAnswer, alive_nodes, on_each
from jobs.cluster.paths import in_job_copy, with_whole_paths
from jobs.training import checkpoint
from jobs.training.backend import NodeTorchConfig, NodeTrainer
from jobs.training.failures import PERMANENT, FailureReporter
from jobs.training.owner import owned
from jobs.training.resources import Resources, check_shortage, few_images
from jobs.training.run_state import STATE_FILE, RunFingerprint
from jobs.training.run_storage import local_checkpoint, storage_error
from jobs.training.stop_signals import clear_stop_request, signals_stop
from jobs.training.trackers import check_installed
from jobs.training.worker import train_worker
from pipeline.dataset.info import DATASET_FILE, DatasetError, DatasetInfo, is_decoded, read_dataset
from pipeline.loading.graph import decoder_name
from pipeline.loading.plan import Plan, color_matrix
from pipeline.storage.locations import is_url, join, open_location, shown, without_keys

ROOM_SECONDS = "20"


def main(config: TrainConfig) -> None:
    config = with_whole_paths(config, "data", "storage", "stage", "from_checkpoint", "init_from")
    recipe = config.make_recipe()
    info = open_dataset(config)
    plan = Plan(info.splits["train"].samples, recipe.batch_size, recipe.seed, color_matrix(info.rgb, recipe.color))
    check_installed(config.tracker)
    run_location = config.run
    with owned(config.storage, run_location):
        done = checkpoint.committed(run_location)
        location, state = None, None
        if done:
            folder, state = list(done.items())[-1]
            location = join(run_location, folder)
        elif config.from_checkpoint is not None:
            with local_checkpoint(config.from_checkpoint) as (location, copy):
                state = checkpoint.read_state(copy)
            config = dataclasses.replace(config, from_checkpoint=location)
        if state is not None:
            # Whether there are GPUs, which decide decoder and precision, is known later.
            was = state.identity
            own = RunFingerprint.of(recipe, info, was.decoder, was.precision, config.init_from)
            checkpoint.check_other(state, own, str(location))
            config = dataclasses.replace(config, init_from=was.init_from or None)
            if checkpoint.finished(state, recipe):
                # The plateau's own end stays, and the rates of other schedules count on the number of epochs.
                extensible = recipe.schedule == "plateau" and not state.progress.schedule.stopped
                cure = "--epochs extends it, " if extensible else ""
                if not done:
                    raise ValueError(
                        f"{shown(str(location))} is finished: {cure}--init-from begins a new training with its weights"
                    )
                print(f"the run {config.name} is finished already; {cure}another --name starts anew")
                print_result(config, run_location, state.progress.history)
                return
        with connected():
            nodes = alive_nodes()
            resources = Resources.of(config, nodes)
            resources.workers.check_more_than(recipe.batch_size)
            check_shortage(resources, nodes)
            if (warning := few_images(resources, recipe)) is not None:
                print(warning, flush=True)
            if recipe.normalization == "batch":
                resources.workers.check_single_images(recipe.batch_size, config.micro_batch)
            check_local_paths(config)
            changed = "".join(f", {name} {value}" for name, value in config.changes().items())
            config = resources.settle(config)
            pixels = config.stage_as == "pixels" or (config.stage is None and is_decoded(Path(config.data)))
            decoder = decoder_name(pixels, resources.gpus, config.gpu_decoder)
            if state is not None:
                own = RunFingerprint.of(recipe, info, decoder, config.precision)
                checkpoint.check_other(state, own, str(location))
            low, high = resources.workers.min_workers, resources.workers.max_workers
            counted = f"{low} to {high} workers" if resources.workers.elastic else f"{high} worker(s)"
            print(
                f"{'starting' if state is None else 'continuing'} run {config.name}: recipe {config.recipe}{changed}, "
                f"{len(info.classes)} classes; an epoch is {plan.steps} step(s) of {recipe.batch_size} and leaves out "
                f"{plan.dropped} of {plan.samples} images; {counted} on "
                f"{'GPU' if resources.gpus else 'CPU'} with {resources.cpus_per_worker} core(s) each; "
                f"{config.precision}; JPEGs decoded by {decoder}",
                flush=True,
            )
            history = launch(config, resources)
        print_result(config, run_location, history)


def open_dataset(config: TrainConfig) -> DatasetInfo:
    """The shard set's description.

    Raises:
        DatasetError: if it cannot be trained on and validated with.
    """
    if is_url(config.data) and config.stage is None:
        raise DatasetError(
            f"--data is {shown(config.data)}: give a folder on each node's own disk to copy it to with --stage"
        )
    info = read_dataset(config.data)
    for split in ("train", "val"):
        if split not in info.splits or info.splits[split].samples == 0:
            raise DatasetError(
                f"the set {shown(config.data)} has no {split} images; shard with --source-val or --val-fraction"
            )
    return info


def launch(config: TrainConfig, resources: Resources) -> list[dict[str, float]]:
    """Runs the workers to the end, by a command line with nothing left open; rank 0's history.

    Raises:
        ValueError: if training failed; it says why.
    """
    filesystem, path = open_location(config.storage)
    run_location, workers = config.run, resources.workers
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
        train_loop_config=config,
        torch_config=NodeTorchConfig(run=run_location, timeout_s=config.collective_seconds),
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
            callbacks=[FailureReporter(config.max_failures)],
            logging_config=LoggingConfig("WARNING"),  # at INFO, every report of every worker is a line
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    )
    clear_stop_request(run_location)
    try:
        with signals_stop(run_location):
            outcome = trainer.fit().return_value
    except TrainingFailedError as error:
        cause = error.controller_failure if isinstance(error, ControllerError) else None
        if isinstance(cause, PERMANENT):
            raise cause from None
        if isinstance(cause, OSError):
            raise storage_error(run_location, cause) from error
        raise ValueError(f"training failed: {error}; the same command continues from the last checkpoint") from error
    except RayError as error:
        # What the kernel or Ray ends when memory is short may be the controller, which nothing starts again.
        raise ValueError(
            f"Ray Train's controller died ({one_line(error)}): look for what ended it, as a lack of memory on this "
            "machine would; the same command continues from the last checkpoint"
        ) from error
    if outcome["stopped"]:
        raise ValueError(f"stopped {outcome['stopped']}, with a checkpoint: run the same command again to continue")
    if outcome["error"]:
        kept = list(checkpoint.committed(run_location))
        raise ValueError(
            f"{outcome['error']}; the last good checkpoint is {join(run_location, kept[-1]) if kept else 'none'}"
        )
    return list(outcome["history"])


def check_local_paths(config: TrainConfig) -> None:
    """Raises ValueError if some node of the cluster does not see a local --storage or --data as this one does."""
    if len(alive_nodes()) < 2:
        return
    mount = "a folder of the same path on a mount that all nodes have"
    # --stage copies on each node from --data, which therefore must be seen there, too.
    bucket = "copy the set to an object store and give its URL and --stage, or give"
    for option, folder, cure, marker in (
        ("--storage", config.run, "give a URL (s3://, gs://) or", None),
        ("--data", config.data, bucket, DATASET_FILE),
        ("--from-checkpoint", config.from_checkpoint, "give a URL, or", STATE_FILE),
    ):
        if folder is not None and not is_url(folder):
            check_shared(option, folder, f"{cure} {mount}", marker)


def check_shared(option: str, folder: str, cure: str, marker: str | None) -> None:
    """Refuses a local folder that some node does not see at the same path, as a shared mount would show it.

    Args:
        marker: a file in the folder whose contents identify it; None to write one here for the check.

    Raises:
        ValueError: naming the nodes.
        OSError: if the folder cannot be made, written or read here.
    """
    written = None
    if marker is None:
        marker = f".seen-by-all-{uuid.uuid4().hex}"
        written = Path(folder) / marker
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(marker)
    try:
        path = os.path.join(folder, marker)
        digest = _contents_digest(path)
        answers = on_each(alive_nodes(), _contents_digest, path)
        blind = [
            f"{node}: {seen.why if isinstance(seen, NoAnswer) else 'other contents'}"
            for node, seen in answers.items()
            if seen != digest
        ]
    finally:
        if written is not None:
            written.unlink(missing_ok=True)
    if blind:
        names = "; ".join(blind[:5]) + (f" and {len(blind) - 5} more" if len(blind) > 5 else "")
        raise ValueError(
            f"{option} {folder} is a folder of {socket.gethostname()} that {len(blind)} node(s) of the cluster do not "
            f"see ({names}): {cure}"
        )


def _contents_digest(path: str) -> str:
    # Listing first makes a network file system look anew; it may answer for one name from its cache.
    os.listdir(os.path.dirname(path))
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def print_result(config: TrainConfig, run: str, history: list[dict[str, float]]) -> None:
    lowest = min(history, key=lambda row: row["top1_error"])
    print(
        f"done: {len(history)} epoch(s); lowest validation error {lowest['top1_error']:.1%} top-1, "
        f"{lowest['top5_error']:.1%} top-5, after epoch {lowest['epoch']}"
    )
    print(f"best checkpoint: {shown(join(run, str(checkpoint.best(checkpoint.committed(run)))))}")
    print(f"next: {evaluation(config, run)}")


def evaluation(config: TrainConfig, run: str) -> str:
    """The command that judges a run, to be given where this one was: in any folder, or submitted as a job."""
    data, saved = (without_keys(one) if is_url(one) else one for one in (config.data, run))
    words = ["--data", data, "--checkpoint", saved, "--ten-crop"]
    if config.stage is not None:
        words += ["--stage", config.stage, "--stage-as", config.stage_as]
    if not in_job_copy():
        return shell_line([sys.executable, str(Path(__file__).with_name("evaluate.py")), *words])
    words += ["--workers", str(config.workers.max_workers if config.workers else 1)] + ["--gpus"] * bool(config.gpus)
    return shell_line(["ray", "job", "submit", "--working-dir", ".", "--", "python", "jobs/evaluate.py", *words])
