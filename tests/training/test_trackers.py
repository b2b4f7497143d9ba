"""What trackers keep, read back by their own readers; MLflow where it is installed."""

from __future__ import annotations

import importlib.util
import re
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import ray

from jobs.cluster.connection import connected
from jobs.training import trackers as module
from jobs.training.trackers import (
    EVENTS,
    MACHINE,
    PROJECT,
    BestEffort,
    End,
    TrackedRun,
    Tracker,
    check_installed,
    make_trackers,
    read_events,
)
from pipeline.storage.locations import join
from tests.shard_sets import s3_options

SETTINGS = {"batch_size": 128, "lr": 0.01}


def track(
    tracker: str | None,
    folder: Path,
    start: int,
    losses: dict[int, float],
    machine: str = "here",
    end: End = "finished",
) -> None:
    trackers = make_trackers(tracker, TrackedRun(str(folder), SETTINGS, machine, start))
    for step, loss in losses.items():
        for one in trackers:
            one.log({"train/loss": loss}, step)
    for one in trackers:
        one.flush()
        one.close(end)


def test_tensorboard_shows_once_what_an_interruption_made_happen_twice(tmp_path: Path) -> None:
    track(None, tmp_path / "run", 0, {10: 2.5, 20: 2.25, 30: 2.125})
    track(None, tmp_path / "run", 20, {30: 2.0, 40: 1.5}, "there")
    found = read_events(str(tmp_path / "run" / EVENTS))
    assert found.scalars == {"train/loss": [(10, 2.5), (20, 2.25), (30, 2.0), (40, 1.5)]}
    assert found.machines == ["here", "there"]
    assert MACHINE not in found.scalars


def test_an_object_store_gets_the_last_metrics_and_one_that_takes_nothing_is_one_warning(
    s3: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = f"{s3_options(s3)}&allow_bucket_creation=false"
    for bucket in ("runs", "nowhere"):
        tensorboard, *_ = make_trackers(None, TrackedRun(f"s3://{bucket}/here{options}", SETTINGS, "here", 0))
        tensorboard.flush()
        tensorboard.log({"train/loss": 2.5}, 10)
        tensorboard.close("finished")
    assert read_events(join(f"s3://runs/here{options}", EVENTS)).scalars == {"train/loss": [(10, 2.5)]}
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: TensorBoard did not take its metrics: ")
    assert line.endswith("; training goes on")


@pytest.mark.slow
def test_prometheus_would_read_the_last_values_from_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # Ray's own 10 s, to wait less.
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
    train = {"train/loss": 2.5, "train/top1_error": 0.75, "train/lr": 1e-05}
    train |= {"train/images_per_s": 1234.5, "train/data_wait": 0.125}
    val = {"val/loss": 2.25, "val/top1_error": 0.5, "val/top5_error": 0.25}
    wanted = {name.replace("/", "_"): value for name, value in (train | val).items()}
    with connected(1):
        (node,) = ray.nodes()
        trackers = make_trackers(None, TrackedRun(str(tmp_path / "first"), SETTINGS, "here", 0))
        for values, step in ((dict.fromkeys(train, 9.0), 10), (train, 20), (val, 20)):
            for one in trackers:
                one.log(values, step)
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        deadline, found = time.monotonic() + 120, dict[str, float]()
        while found != wanted and time.monotonic() < deadline:
            time.sleep(0.1)
            text = urllib.request.urlopen(address, timeout=30).read().decode()
            lines = re.findall(r'^ray_alexnet_(\w+)\{.*\brun="first".*\} (\S+)$', text, re.MULTILINE)
            found = {name: float(value) for name, value in lines}
        assert found == wanted
        for one in trackers:
            one.close("finished")


class Broken(Tracker):
    """Fails at whatever is in `at`; a call to `hang` waits for the test to end."""

    def __init__(self, at: set[str], ended: threading.Event | None = None) -> None:
        self.at, self.ended, self.calls = at, ended, list[object]()
        self._do("make")

    def _do(self, name: str, *values: object) -> None:
        self.calls.append((name, *values))
        if name in self.at:
            # What a library raises need not be an OSError.
            raise RuntimeError(f"{name}\nrefused")

    def log(self, values: dict[str, float], step: int) -> None:
        if self.ended is not None:
            self.ended.wait(60)
        self._do("log", step)

    def flush(self) -> None:
        self._do("flush")

    def close(self, end: End) -> None:
        self._do("close", end)


@pytest.mark.parametrize("at", [{"make"}, {"log"}, {"log", "flush", "close"}])
def test_a_tracker_that_fails_is_said_once_and_asked_again(at: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    made: list[Broken] = []

    def make() -> Broken:
        made.append(Broken(at))
        return made[0]

    one = BestEffort("Some Tracker", make)
    for step in range(3):
        one.log({"train/loss": 1.0}, step)
    one.flush()
    one.close("stopped")
    what = "cannot be opened and gets no metrics: make" if "make" in at else "did not take its metrics: log"
    assert capsys.readouterr().out == f"warning: Some Tracker {what} refused; training goes on\n"
    if "make" not in at:
        assert made[0].calls == [("make",), ("log", 0), ("log", 1), ("log", 2), ("flush",), ("close", "stopped")]


def test_nobody_waits_for_a_tracker_that_hangs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CLOSE_SECONDS", 0.01)
    ended = threading.Event()
    one = BestEffort("Some Tracker", lambda: Broken(set(), ended))
    for step in range(1000):
        one.log({"train/loss": 1.0}, step)
        one.flush()
    one.close("finished")
    out = capsys.readouterr().out
    assert out == "warning: Some Tracker did not take its last metrics within 0.01 s; training goes on\n"
    ended.set()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    check_installed(None)
    with pytest.raises(ValueError, match=r"--tracker mlflow needs .* pip install mlflow-skinny"):
        check_installed("mlflow")


def test_mlflow_continues_the_run_of_the_same_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the path has a quote, which would end a string in a filter; and it knows how each run ended."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "server").as_uri())
    place = tmp_path / 'the owner\'s "runs"'
    track("mlflow", place / "first", 0, {10: 2.5}, end="stopped")
    track("mlflow", place / "other", 0, {10: 9.0}, end="failed")
    track("mlflow", place / "first", 10, {20: 2.25})
    track("mlflow", place / "third", 0, {10: 9.0}, end="stopped")
    client = mlflow.MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name(PROJECT).experiment_id])
    found = {run.info.run_name: run.info.status for run in runs}
    assert found == {"first": "FINISHED", "other": "FAILED", "third": "KILLED"}
    assert len(runs) == 3
    (first,) = (run for run in runs if run.info.run_name == "first")
    assert first.data.params == {"batch_size": "128", "lr": "0.01"}
    history = client.get_metric_history(first.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(10, 2.5), (20, 2.25)]
