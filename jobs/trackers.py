"""Who keeps a run's metrics: TensorBoard's events always, MLflow or Weights & Biases as well if asked.

    train/loss  train/top1_error  train/lr  train/images_per_s  train/data_wait    every --log-every steps
    val/loss  val/top1_error  val/top5_error                                       after each epoch

Losses are in nats, errors and data_wait fractions, steps counted from the run's start. What a run repeats after an
interruption replaces what TensorBoard had; MLflow keeps both, and Weights & Biases the first.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import tempfile
import time
from typing import Any, Protocol

from pyarrow import fs as arrow_fs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from pipeline.storage import join, open_location

EVENTS = "tensorboard"  # In the run's folder
MACHINE = "run/machine"
PROJECT = "alexnet-trainer"  # MLflow's experiment and Weights & Biases' project
PACKAGES = {"mlflow": "mlflow", "wandb": "wandb"}
MOST_POINTS = 2000  # Of one metric; a chart shows no more.


@dataclasses.dataclass(frozen=True)
class Tracked:
    """A run, as a tracker is told of it."""

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
    """Told of metrics by rank 0."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Metrics after so many steps of the run."""
        ...

    def flush(self) -> None:
        """After an epoch: what was told is to be where others read it."""
        ...

    def close(self) -> None:
        """At the end."""
        ...


def refuse_missing(tracker: str | None) -> None:
    """Raises ValueError if a tracker's package is not installed."""
    if tracker is not None and importlib.util.find_spec(PACKAGES[tracker]) is None:
        raise ValueError(f"--tracker {tracker} needs its package, on every node: pip install -e '.[{tracker}]'")


def make_trackers(tracker: str | None, run: Tracked) -> list[Tracker]:
    """TensorBoard, and what else was asked for: mlflow or wandb."""
    made: list[Tracker] = [TensorBoard(run)]
    if tracker == "mlflow":
        made.append(MLflow(run))
    elif tracker == "wandb":
        made.append(WeightsAndBiases(run))
    return made


class TensorBoard:
    """Events in STORAGE/NAME/tensorboard."""

    def __init__(self, run: Tracked) -> None:
        self._storage, self._path = open_location(join(run.location, EVENTS))
        # Appending is nothing that object stores do: events are written here and copied there, after each epoch and at
        # the end.
        remote = not isinstance(self._storage, arrow_fs.LocalFileSystem)
        self._local = tempfile.mkdtemp() if remote else self._path
        # What an interrupted run wrote after its last checkpoint is hidden by purge_step: it happens again.
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
        # At the end, well or not: a store that fails now must not hide how training ended.
        except OSError as error:
            print(f"warning: TensorBoard's last events were not kept: {' '.join(str(error).split())}", flush=True)

    def _copy(self) -> None:
        if self._local != self._path:
            self._storage.create_dir(self._path, recursive=True)
            arrow_fs.copy_files(self._local, self._path, destination_filesystem=self._storage)


class MLflow:
    """A run of the experiment alexnet-trainer at MLFLOW_TRACKING_URI, found again by its location when continued."""

    def __init__(self, run: Tracked) -> None:
        import mlflow

        self._error = mlflow.exceptions.MlflowException
        self._metric = mlflow.entities.Metric
        self._client = mlflow.MlflowClient()
        self._sent: list[Any] = []
        experiment = mlflow.set_experiment(PROJECT).experiment_id
        known = self._client.search_runs([experiment], f"tags.location = '{run.location}'")
        if known:
            self._run = known[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
        else:
            tags = {"location": run.location}
            self._run = self._client.create_run(experiment, tags=tags, run_name=run.name).info.run_id
            for name, value in run.settings.items():
                self._client.log_param(self._run, name, value)
        self._client.set_tag(self._run, "machine", run.machine)

    def log(self, values: dict[str, float], step: int) -> None:
        now = round(1000 * time.time())
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        # Sent by a thread: training does not wait for a server.
        self._sent.append(self._client.log_batch(self._run, metrics, synchronous=False))

    def flush(self) -> None:
        lost, reason = 0, ""
        for operation in self._sent:
            try:
                operation.wait()
            except self._error as error:
                lost, reason = lost + 1, str(error)
        if lost:
            print(f"warning: MLflow did not take {lost} of {len(self._sent)} rows of metrics: {reason}", flush=True)
        self._sent.clear()

    def close(self) -> None:
        self.flush()
        self._client.set_terminated(self._run)


class WeightsAndBiases:
    """A run of the project alexnet-trainer; WANDB_API_KEY or WANDB_MODE say where."""

    def __init__(self, run: Tracked) -> None:
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
        found = EventAccumulator(folder, size_guidance={"scalars": MOST_POINTS, "tensors": 0})
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
