"""Where a run's metrics go: to TensorBoard and Ray's own metrics always, to MLflow or Weights & Biases if asked.

None can harm the run: each has a thread of its own, so that one that fails or hangs costs no step and no checkpoint.

    train/loss  train/top1_error  train/lr  train/images_per_s  train/data_wait    every --log-every steps
    val/loss  val/top1_error  val/top5_error                                       after each epoch

Losses are in nats; errors and data_wait are fractions; steps count from the run's start. Of steps that a run repeats
after an interruption, TensorBoard shows the second time, MLflow both, Weights & Biases the first.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import queue
import tempfile
import threading
from collections.abc import Callable
from typing import Any, Literal

from pyarrow import fs as arrow_fs
from ray.util.metrics import Gauge
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from jobs.cli.command import one_line
from pipeline.storage.locations import join, open_location, shown

EVENTS = "tensorboard"  # In the run's folder
MACHINE = "run/machine"
PROJECT = "alexnet-trainer"  # MLflow's experiment and Weights & Biases' project
PACKAGES = {"mlflow": "mlflow-skinny", "wandb": "wandb"}
MAX_POINTS = 2000  # Of one metric; a chart shows no more.
CLOSE_SECONDS = 30.0  # For a tracker to send what it has left at the end.

End = Literal["finished", "stopped", "failed"]
"""How a run ended: done; told to stop, to be continued; or with an error."""


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
        return shown(self.location).rpartition("/")[2]

    @property
    def id(self) -> str:
        """The same when the run is continued; plain letters and digits."""
        return hashlib.sha256(self.location.encode()).hexdigest()[:16]


class Tracker:
    """Called by rank 0, in a thread of the tracker's own."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Records metrics; `step` counts from the run's start."""

    def flush(self) -> None:
        """Makes the metrics readable; called after each epoch."""

    def close(self, end: End) -> None: ...


class BestEffort:
    """Makes and calls a tracker in a thread; a failure is said once, and no call waits for it."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self._name = name
        self._calls: queue.SimpleQueue[Callable[[Tracker], None] | None] = queue.SimpleQueue()
        self._failed = False
        self._thread = threading.Thread(target=self._run, args=(make,), daemon=True)
        self._thread.start()

    def log(self, values: dict[str, float], step: int) -> None:
        self._calls.put(lambda tracker: tracker.log(values, step))

    def flush(self) -> None:
        self._calls.put(lambda tracker: tracker.flush())

    def close(self, end: End) -> None:
        """Waits for the calls before, but no longer than CLOSE_SECONDS."""
        self._calls.put(lambda tracker: tracker.close(end))
        self._calls.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._warn(f"did not take its last metrics within {CLOSE_SECONDS:g} s")

    def _run(self, make: Callable[[], Tracker]) -> None:
        # The libraries raise what they like.
        try:
            tracker = make()
        except Exception as error:
            self._warn(f"cannot be opened and gets no metrics: {one_line(error)}")
            return
        while (call := self._calls.get()) is not None:
            try:
                call(tracker)
            except Exception as error:
                self._warn(f"did not take its metrics: {one_line(error)}")

    def _warn(self, what: str) -> None:
        if not self._failed:
            print(f"warning: {self._name} {what}; training goes on", flush=True)
        self._failed = True


def check_installed(tracker: str | None) -> None:
    """Raises ValueError if a tracker's package is not installed."""
    if tracker is not None and importlib.util.find_spec(tracker) is None:
        raise ValueError(f"--tracker {tracker} needs its package, on every node: pip install {PACKAGES[tracker]}")


def make_trackers(tracker: str | None, run: TrackedRun) -> list[BestEffort]:
    """TensorBoard and Ray's metrics, and mlflow or wandb if asked for."""
    made = [BestEffort("TensorBoard", lambda: TensorBoard(run)), BestEffort("Ray's metrics", lambda: RayMetrics(run))]
    if tracker == "mlflow":
        made.append(BestEffort("MLflow", lambda: MLflow(run)))
    elif tracker == "wandb":
        made.append(BestEffort("Weights & Biases", lambda: WeightsAndBiases(run)))
    return made


class TensorBoard(Tracker):
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

    def close(self, end: End) -> None:
        self._writer.close()
        self._copy()

    def _copy(self) -> None:
        if self._local != self._path:
            self._storage.create_dir(self._path, recursive=True)
            arrow_fs.copy_files(self._local, self._path, destination_filesystem=self._storage)


class RayMetrics(Tracker):
    """Gauges among Ray's own metrics, which each node offers to Prometheus: train/loss as ray_alexnet_train_loss."""

    def __init__(self, run: TrackedRun) -> None:
        self._tags = {"run": run.name}
        self._gauges: dict[str, Gauge] = {}

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(f"alexnet_{name.replace('/', '_')}", name, tag_keys=("run",))
            self._gauges[name].set(value, self._tags)


class MLflow(Tracker):
    """A run of the experiment alexnet-trainer at MLFLOW_TRACKING_URI, found again by its location when continued."""

    def __init__(self, run: TrackedRun) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(PROJECT)
        # Not by the location, in which a quote would end the filter's string.
        known = mlflow.search_runs(filter_string=f"tags.run = '{run.id}'", output_format="list")
        if known:
            mlflow.start_run(known[0].info.run_id)
        else:
            mlflow.start_run(run_name=run.name, tags={"run": run.id, "location": shown(run.location)})
            mlflow.log_params(run.settings)
        mlflow.set_tag("machine", run.machine)

    def log(self, values: dict[str, float], step: int) -> None:
        # Sent by a thread, so that training does not wait for a server.
        self._mlflow.log_metrics(values, step=step, synchronous=False)

    def flush(self) -> None:
        self._mlflow.flush_async_logging()

    def close(self, end: End) -> None:
        self.flush()
        self._mlflow.end_run({"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[end])


class WeightsAndBiases(Tracker):
    """A run of the project alexnet-trainer; WANDB_API_KEY or WANDB_MODE say where."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._run = wandb.init(
            project=PROJECT,
            name=run.name,
            # The same run, when it is continued.
            id=run.id,
            resume="allow",
            dir=tempfile.mkdtemp() if "://" in run.location else run.location,
            config={**run.settings, "machine": run.machine},
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self, end: End) -> None:
        # Any status but 0 marks the run as failed; it has no word for one that will go on.
        self._run.finish(exit_code=0 if end == "finished" else 1)


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
