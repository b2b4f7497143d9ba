"""What trackers keep, read back by their own readers; MLflow and Weights & Biases where they are installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import boto3
import pytest

from jobs.training.trackers import (
    EVENTS,
    MACHINE,
    PROJECT,
    TrackedRun,
    Tracker,
    check_installed,
    make_trackers,
    read_events,
)
from pipeline.storage.locations import join

SETTINGS = {"batch_size": 128, "lr": 0.01}


def track(
    tracker: str | None, folder: Path, start: int, losses: dict[int, float], machine: str = "here"
) -> list[Tracker]:
    trackers = make_trackers(tracker, TrackedRun(str(folder), SETTINGS, machine, start))
    for step, loss in losses.items():
        for one in trackers:
            one.log({"train/loss": loss}, step)
    for one in trackers:
        one.flush()
        one.close()
    return trackers


def test_tensorboard_shows_once_what_an_interruption_made_happen_twice(tmp_path: Path) -> None:
    track(None, tmp_path / "run", 0, {10: 2.5, 20: 2.25, 30: 2.125})
    track(None, tmp_path / "run", 20, {30: 2.0, 40: 1.5}, "there")
    found = read_events(str(tmp_path / "run" / EVENTS))
    assert found.scalars == {"train/loss": [(10, 2.5), (20, 2.25), (30, 2.0), (40, 1.5)]}
    assert found.machines == ["here", "there"]
    assert MACHINE not in found.scalars


def test_what_was_told_after_the_last_epoch_reaches_an_object_store_too(s3: str) -> None:
    boto3.client("s3", endpoint_url=f"http://{s3}").create_bucket(Bucket="runs")
    run = f"s3://runs/here?region=us-east-1&scheme=http&endpoint_override={s3}"
    (tensorboard,) = make_trackers(None, TrackedRun(run, SETTINGS, "here", 0))
    tensorboard.log({"train/loss": 2.5}, 10)
    tensorboard.close()
    assert read_events(join(run, EVENTS)).scalars == {"train/loss": [(10, 2.5)]}


def test_a_store_that_is_gone_at_the_end_is_a_warning(s3: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = f"s3://nowhere/here?region=us-east-1&scheme=http&endpoint_override={s3}&allow_bucket_creation=false"
    (tensorboard,) = make_trackers(None, TrackedRun(run, SETTINGS, "here", 0))
    tensorboard.close()
    assert "warning: TensorBoard's last events were not kept: " in capsys.readouterr().out


def test_a_run_without_events_has_none(tmp_path: Path) -> None:
    found = read_events(str(tmp_path / "none"))
    assert (found.scalars, found.machines) == ({}, [])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    check_installed(None)
    with pytest.raises(ValueError, match=r"--tracker mlflow needs .* pip install -e '\.\[mlflow\]'"):
        check_installed("mlflow")


def test_mlflow_continues_the_run_of_the_same_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "server").as_uri())
    track("mlflow", tmp_path / "first", 0, {10: 2.5})
    track("mlflow", tmp_path / "other", 0, {10: 9.0})
    track("mlflow", tmp_path / "first", 10, {20: 2.25})
    client = mlflow.MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name(PROJECT).experiment_id])
    assert {run.info.run_name for run in runs} == {"first", "other"}
    (first,) = (run for run in runs if run.info.run_name == "first")
    assert first.data.params == {"batch_size": "128", "lr": "0.01"}
    history = client.get_metric_history(first.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(10, 2.5), (20, 2.25)]


def test_weights_and_biases_takes_the_same_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "run").mkdir()
    track("wandb", tmp_path / "run", 0, {10: 2.5, 20: 2.25})
    (written,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    # The format is its own; names stand in it as they are.
    for name in (b"train/loss", b"2.25", b"batch_size"):
        assert name in written.read_bytes(), name
