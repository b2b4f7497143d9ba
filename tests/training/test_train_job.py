"""The commands as a user runs them: train, be killed, continue, evaluate, report; and what they refuse."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from jobs.training import checkpoint
from tests.processes import outside_clusters, run_here

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ["--workers", "2", "--batch-size", "15", "--log-every", "1", "--no-gpus"]


def command(job: str, *arguments: object) -> list[str]:
    return [sys.executable, f"jobs/{job}.py", *map(str, arguments)]


def environment() -> dict[str, str]:
    return outside_clusters()


def call(job: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(job, *arguments), cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=600
    )


def refusal(job: str, *arguments: object) -> str:
    """The one line with which a command fails, before it starts Ray."""
    done = run_here(job, *arguments)
    assert done.returncode == 1, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert "Traceback" not in done.stderr
    return line


@pytest.fixture(scope="module")
def run(shard_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two workers and three epochs, never disturbed."""
    storage = tmp_path_factory.mktemp("runs")
    done = call("train", "--data", shard_set, "--storage", storage, "--name", "whole", "--epochs", "3", *TRAIN)
    assert done.returncode == 0, done.stdout + done.stderr
    return storage / "whole"


@pytest.mark.slow
def test_a_run_can_be_followed_and_leaves_what_is_needed(run: Path, shard_set: Path) -> None:
    states = checkpoint.committed(str(run))
    last = list(states.values())[-1].progress
    assert last.finished
    assert [row["epoch"] for row in last.history] == [1, 2, 3]
    assert {row["images"] for row in last.history} == {45}
    assert {row["val_images"] for row in last.history} == {15}
    assert list((run / "tensorboard").glob("events.*"))


@pytest.mark.slow
def test_a_run_killed_in_an_epoch_ends_with_the_same_weights(run: Path, shard_set: Path, tmp_path: Path) -> None:
    arguments = ["--data", shard_set, "--storage", tmp_path, "--name", "whole", "--epochs", "3", *TRAIN]
    arguments += ["--checkpoint-every", "2"]
    process = subprocess.Popen(
        command("train", *arguments),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        # The second epoch's third step: past the checkpoint at its second.
        if "epoch 2/3 step 3/3" in line:
            break
    else:
        pytest.fail("".join(seen))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    before = list(checkpoint.committed(str(tmp_path / "whole")))
    assert before
    assert not list(checkpoint.committed(str(tmp_path / "whole")).values())[-1].progress.finished

    # From decoded pixels now: what a stage holds must not matter.
    done = call("train", *arguments, "--stage", tmp_path / "disk", "--stage-as", "pixels")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "continuing" in done.stdout
    assert "of pixels" in done.stdout
    # Ray Train's actors that look after clusters would complain, for want of a dashboard or of their own accord.
    assert "PlacementGroupCleaner" not in done.stdout + done.stderr
    assert "PreemptionWatcher" not in done.stdout + done.stderr
    for name in ("model.safetensors", "optimizer.safetensors"):
        whole = load_file(run / "checkpoint_0003_000000" / name)
        resumed = load_file(tmp_path / "whole" / "checkpoint_0003_000000" / name)
        assert whole.keys() == resumed.keys()
        assert all(whole[key].equal(resumed[key]) for key in whole)


@pytest.mark.slow
def test_evaluation_agrees_with_training_and_counts_each_image_once(run: Path, shard_set: Path, tmp_path: Path) -> None:
    last = list(checkpoint.committed(str(run)).values())[-1].progress.history[-1]
    one, ten = tmp_path / "one.json", tmp_path / "ten.json"
    newest = run / "checkpoint_0003_000000"
    for extra in (["--json", one, "--batch-size", 4], ["--json", ten, "--ten-crop"]):
        done = run_here("evaluate", "--data", shard_set, "--checkpoint", newest, *extra)
        assert done.returncode == 0, done.stderr
    found = json.loads(one.read_text())
    assert (found["images"], found["crops"]) == (15, 1)
    assert found["top1_error"] == last["top1_error"]
    assert found["loss"] == pytest.approx(last["val_loss"], rel=1e-4)
    found = json.loads(ten.read_text())
    assert (found["images"], found["crops"]) == (15, 10)


@pytest.mark.slow
def test_a_runs_folder_stands_for_its_best_checkpoint(run: Path, shard_set: Path, tmp_path: Path) -> None:
    states = checkpoint.committed(str(run))
    history = list(states.values())[-1].progress.history
    done = call("evaluate", "--data", shard_set, "--checkpoint", run, "--json", tmp_path / "best.json")
    assert done.returncode == 0, done.stderr
    lowest = min(row["top1_error"] for row in history)
    assert json.loads((tmp_path / "best.json").read_text())["top1_error"] == lowest
    done = call("report", "--storage", run.parent, "--name", run.name, "--output", tmp_path / "report.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 3 + 1
    assert f"{lowest:.1%} top-1" in page


@pytest.mark.slow
def test_a_finished_runs_name_says_so_and_another_configuration_is_refused(run: Path, shard_set: Path) -> None:
    arguments = ["--data", shard_set, "--storage", run.parent, "--name", run.name, "--epochs", "3", *TRAIN]
    done = run_here("train", *arguments)
    assert done.returncode == 0
    assert "finished already" in done.stdout
    line = refusal("train", *arguments, "--lr", "0.02")
    assert "lr is 0.02, was 0.01" in line
    assert "another --name" in line


def test_a_missing_or_unfinished_set_is_refused(tmp_path: Path) -> None:
    rest = ["--storage", tmp_path / "runs", "--name", "a"]
    assert "does not exist; make" in refusal("train", "--data", tmp_path / "none", *rest)
    (tmp_path / "begun" / "train").mkdir(parents=True)
    assert "is unfinished: it has no dataset.json" in refusal("train", "--data", tmp_path / "begun", *rest)
    assert not (tmp_path / "runs").exists()


def test_a_storage_that_cannot_be_written_is_refused(shard_set: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    line = refusal("train", "--data", shard_set, "--storage", file, "--name", "a", "--batch-size", "15")
    assert "cannot be written" in line
    assert "--storage" in line


def test_a_batch_larger_than_the_set_is_refused(shard_set: Path, tmp_path: Path) -> None:
    line = refusal("train", "--data", shard_set, "--storage", tmp_path, "--name", "a")
    assert "45 training images, fewer than one batch of 128" in line


@pytest.mark.slow
def test_a_checkpoint_of_other_classes_is_refused(run: Path, shard_set: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(shard_set, other)
    description = json.loads((other / "dataset.json").read_text())
    description["classes"].append({"index": 3, "wnid": "n3", "name": "n3"})
    (other / "dataset.json").write_text(json.dumps(description))
    line = refusal("evaluate", "--data", other, "--checkpoint", run)
    assert "3 classes" in line
    assert "4 (n0" in line


def test_what_is_no_checkpoint_is_refused(shard_set: Path, tmp_path: Path) -> None:
    assert "does not exist" in refusal("evaluate", "--data", shard_set, "--checkpoint", tmp_path / "none")
    assert "no finished epoch" in refusal("evaluate", "--data", shard_set, "--checkpoint", tmp_path)


def test_wrong_usage_exits_with_2(tmp_path: Path) -> None:
    assert run_here("train", "--data", tmp_path).returncode == 2
    assert run_here("evaluate", "--nonsense").returncode == 2


@pytest.mark.parametrize("job", ["shard_imagenet", "train", "evaluate", "report", "demo"])
def test_help_describes_every_flag(job: str) -> None:
    done = run_here(job, "--help")
    assert done.returncode == 0
    assert "usage:" in done.stdout.lower()
