"""The commands as a user runs them: what a run leaves, its evaluation and report; and what they refuse."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Literal

import pytest

from jobs import train
from jobs.cluster.paths import with_whole_paths
from jobs.training import checkpoint
from jobs.training.config import TrainConfig
from jobs.training.run_state import STATE_FILE, RunFingerprint, State
from jobs.training.trackers import EVENTS, read_events
from model.progress import Progress
from model.schedule import Plateau
from pipeline.dataset.info import read_dataset
from tests.processes import refusal, run_here
from tests.runs import command


@pytest.mark.slow
def test_a_run_leaves_what_is_needed_and_evaluation_and_report_agree_with_it(
    pair: Path, shard_set: Path, tmp_path: Path
) -> None:
    """A run's folder stands for its best checkpoint."""
    progress = list(checkpoint.committed(str(pair)).values())[-1].progress
    assert progress.finished
    assert [(row["epoch"], row["images"], row["val_images"]) for row in progress.history] == [(1, 45, 15), (2, 45, 15)]
    # Every step, as --log-every 1 asks.
    assert [step for step, _ in read_events(str(pair / EVENTS)).scalars["train/loss"]] == list(range(1, 11))
    best = min(progress.history, key=lambda row: row["top1_error"])
    done = run_here("evaluate", "--data", shard_set, "--checkpoint", pair, "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["images"], found["crops"], found["top1_error"]) == (15, 1, best["top1_error"])
    assert found["loss"] == pytest.approx(best["val_loss"], rel=1e-4)
    done = run_here("report", "--storage", pair.parent, "--name", pair.name, "--output", tmp_path / "report.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 3 + 1
    assert f"{best['top1_error']:.1%} top-1" in page


@pytest.mark.slow
def test_a_finished_runs_name_says_so_and_another_configuration_is_refused(pair: Path, shard_set: Path) -> None:
    _, *arguments = command(shard_set, str(pair.parent), 2, 2)
    done = run_here("train", *arguments)
    assert done.returncode == 0
    assert "finished already" in done.stdout
    assert "lr is 0.02, was 0.01" in refusal("train", *arguments, "--lr", "0.02")


@pytest.mark.slow
def test_a_checkpoint_of_other_classes_is_refused(pair: Path, shard_set: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(shard_set, other)
    description = json.loads((other / "dataset.json").read_text())
    description["classes"].append({"index": 3, "wnid": "n3", "name": "n3"})
    (other / "dataset.json").write_text(json.dumps(description))
    line = refusal("evaluate", "--data", other, "--checkpoint", pair)
    assert "3 classes" in line
    assert "4 (n0" in line


def test_what_cannot_be_trained_on_written_or_judged_is_refused(shard_set: Path, tmp_path: Path) -> None:
    rest = ["--storage", tmp_path / "runs", "--name", "a"]
    assert "does not exist; make" in refusal("train", "--data", tmp_path / "none", *rest)
    (tmp_path / "begun" / "train").mkdir(parents=True)
    assert "is unfinished: it has no dataset.json" in refusal("train", "--data", tmp_path / "begun", *rest)
    assert "45 training images, fewer than one batch of 128" in refusal("train", "--data", shard_set, *rest)
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs").write_text("not a folder")
    line = refusal("train", "--data", shard_set, "--batch-size", "15", *rest)
    assert "cannot be written" in line
    assert "--storage" in line
    assert "does not exist" in refusal("evaluate", "--data", shard_set, "--checkpoint", tmp_path / "none")
    assert "no finished epoch" in refusal("evaluate", "--data", shard_set, "--checkpoint", tmp_path)


@pytest.mark.parametrize(("schedule", "stopped"), [("plateau", False), ("plateau", True), ("poly", False)])
def test_more_epochs_are_told_of_only_where_they_extend_a_run(
    shard_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    schedule: Literal["plateau", "poly"],
    stopped: bool,
) -> None:
    monkeypatch.setattr(train, "connected", lambda: pytest.fail("it started"))
    config = TrainConfig(str(shard_set), str(tmp_path), "old", batch_size=15, epochs=1, schedule=schedule)
    recipe, row = config.make_recipe(), {"epoch": 1, "top1_error": 0.5, "top5_error": 0.0}
    progress = Progress(Plateau(recipe.lr, stopped=stopped), epoch=1, history=[row])
    folder = tmp_path / "old" / "checkpoint_0001_000000"
    folder.mkdir(parents=True)
    (folder / STATE_FILE).write_bytes(State(RunFingerprint.of(recipe, read_dataset(shard_set)), progress).to_json({}))
    train.main(config)
    said, extended = capsys.readouterr().out, schedule == "plateau" and not stopped
    assert "is finished already" in said
    assert ("--epochs extends it" in said) == extended
    with pytest.raises(ValueError, match=f"{folder} is finished: .*--init-from") as found:
        train.main(dataclasses.replace(config, name="new", from_checkpoint=str(folder)))
    assert ("--epochs extends it" in str(found.value)) == extended


def test_a_path_is_made_absolute_and_a_url_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = TrainConfig("set", "runs", "a", stage="/stage", from_checkpoint="gs://runs/b")
    config = with_whole_paths(given, "data", "storage", "stage", "from_checkpoint", "init_from")
    assert (config.data, config.storage) == (f"{tmp_path}/set", f"{tmp_path}/runs")
    assert (config.stage, config.from_checkpoint) == ("/stage", "gs://runs/b")


@pytest.mark.parametrize(
    ("job", "flag"),
    [
        *(("train", flag) for flag in ("data", "storage", "stage", "from-checkpoint", "init-from")),
        *(("shard_imagenet", flag) for flag in ("output", "source", "source-val")),
    ],
)
def test_a_relative_path_of_a_submitted_job_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, flag: str
) -> None:
    """Its working directory is where Ray unpacks the code, which another submission will not find."""
    folder = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123456789abcdef"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    given = {"data": "s3://bucket/set", "storage": "/mnt/runs", "name": "a"}
    if job == "shard_imagenet":
        given = {"source": "/images", "output": "s3://bucket/set"}
    line = refusal(job, *(text for name, path in {**given, flag: "x"}.items() for text in (f"--{name}", path)))
    assert line == (
        f"error: --{flag} is the relative path x, and a submitted job runs in a temporary copy of the code: give an "
        "absolute path or a URL"
    )
    assert not any(folder.iterdir())
