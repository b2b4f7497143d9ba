"""Where a run's metrics go: to TensorBoard always, to MLflow or Weights & Biases as well if asked.

    train/loss  train/top1_error  train/lr  train/images_per_s  train/data_wait    every --log-every steps
    val/loss  val/top1_error  val/top5_error                                       after each epoch

Losses are in nats; errors and data_wait are fractions; steps count from the run's start. Of steps that a run repeats
after an interruption, TensorBoard shows the second time, MLflow both, Weights & Biases the first.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import tempfile
from typing import Any, Protocol

from pyarrow import fs as arrow_fs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from pipeline.storage.locations import join, open_location

EVENTS = "tensorboard"  # In the run's folder
MACHINE = "run/machine"
PROJECT = "alexnet-trainer"  # MLflow's experiment and Weights & Biases' project
MAX_POINTS = 2000  # Of one metric; a chart shows no more.


@dataclasses.dataclass(frozen=True)
class TrackedRun:
    """What a tracker records of a run, beside its metrics."""

    location: str
    """STORAGE/NAME."""
    settings: dict[str, Any]
    """The recipe."""
    machine: str
    """What it runs on, for people."""
    start: int
    """Steps done before."""

    @property
    def name(self) -> str:
        return self.location.rpartition("/")[2]


class Tracker(Protocol):
    """Called by rank 0."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Records metrics; `step` counts from the run's start."""
        ...

    def flush(self) -> None:
        """Makes the metrics readable; called after each epoch."""
        ...

    def close(self) -> None:
        """Called at the end of the run."""
        ...


def check_installed(tracker: str | None) -> None:
    """Raises ValueError if a tracker's package is not installed."""
    if tracker is not None and importlib.util.find_spec(tracker) is None:
        raise ValueError(f"--tracker {tracker} needs its package, on every node: pip install -e '.[{tracker}]'")


def make_trackers(tracker: str | None, run: TrackedRun) -> list[Tracker]:
    """TensorBoard, and mlflow or wandb if asked for."""
    made: list[Tracker] = [TensorBoard(run)]
    if tracker == "mlflow":
        made.append(MLflow(run))
    elif tracker == "wandb":
        made.append(WeightsAndBiases(run))
    return made


class TensorBoard:
    """Events in STORAGE/NAME/tensorboard."""

    def __init__(self, run: TrackedRun) -> None:
        self._storage, self._path = open_location(join(run.location, EVENTS))
        # Object stores do not append: events are written here and copied there after each epoch and at the end.
        remote = not isinstance(self._storage, arrow_fs.LocalFileSystem)
        self._local = tempfile.mkdtemp() if remote else self._path
        # purge_step hides what an interrupted run wrote after its last checkpoint: those steps happen again.
        self._writer = SummaryWriter(self._local, purge_step=run.start + 1)
        self._writer.add_text(MACHINE, run.machine, run.start)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()
        self._copy()

    def close(self) -> None:
        self._writer.close()
        try:
            self._copy()
        # A store that fails now must not hide how training ended.
        except OSError as error:
            print(f"warning: TensorBoard's last events were not kept: {' '.join(str(error).split())}", flush=True)

    def _copy(self) -> None:
        if self._local != self._path:
            self._storage.create_dir(self._path, recursive=True)
            arrow_fs.copy_files(self._local, self._path, destination_filesystem=self._storage)


class MLflow:
    """A run of the experiment alexnet-trainer at MLFLOW_TRACKING_URI, found again by its location when continued."""

    def __init__(self, run: TrackedRun) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(PROJECT)
        known = mlflow.search_runs(filter_string=f"tags.location = '{run.location}'", output_format="list")
        if known:
            mlflow.start_run(known[0].info.run_id)
        else:
            mlflow.start_run(run_name=run.name, tags={"location": run.location})
            mlflow.log_params(run.settings)
        mlflow.set_tag("machine", run.machine)

    def log(self, values: dict[str, float], step: int) -> None:
        # Sent by a thread, so that training does not wait for a server.
        self._mlflow.log_metrics(values, step=step, synchronous=False)

    def flush(self) -> None:
        self._mlflow.flush_async_logging()

    def close(self) -> None:
        self.flush()
        self._mlflow.end_run()


class WeightsAndBiases:
    """A run of the project alexnet-trainer; WANDB_API_KEY or WANDB_MODE say where."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._run = wandb.init(
            project=PROJECT,
            name=run.name,
            # The same run, when it is continued.
            id=hashlib.sha256(run.location.encode()).hexdigest()[:16],
            resume="allow",
            dir=tempfile.mkdtemp() if "://" in run.location else run.location,
            config={**run.settings, "machine": run.machine},
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def flush(self) -> None:
        """It sends by itself."""

    def close(self) -> None:
        self._run.finish()


@dataclasses.dataclass(frozen=True)
class Events:
    """What TensorBoard's events say of a run."""

    scalars: dict[str, list[tuple[float, float]]]
    """By metric: (steps, value), in order; at most 2,000, drawn evenly."""
    machines: list[str]
    """What it ran on, one after the other."""


def read_events(location: str) -> Events:
    """Reads back what `TensorBoard` wrote at a path or URL; empty if there is nothing."""
    filesystem, path = open_location(location)
    if filesystem.get_file_info(path).type != arrow_fs.FileType.Directory:
        return Events({}, [])
    with tempfile.TemporaryDirectory() as folder:
        arrow_fs.copy_files(path, folder, source_filesystem=filesystem)
        found = EventAccumulator(folder, size_guidance={"scalars": MAX_POINTS, "tensors": 0})
        found.Reload()
        tags = found.Tags()
        scalars = {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in tags["scalars"]}
        texts = [
            event.tensor_proto.string_val[0].decode()
            for tag in tags["tensors"]
            if tag.startswith(MACHINE)
            for event in found.Tensors(tag)
        ]
    return Events(scalars, list(dict.fromkeys(texts)))
