"""Real faults while a real run trains: nothing is lost but the steps since the last checkpoint.

Each ends with the weights of a run that was never disturbed, bit for bit, having seen each image once an epoch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from ray.train import Checkpoint

from jobs.training.run_storage import CheckpointUploader, StorageError, check_run_folder
from tests.runs import Run, assert_alike, last, undisturbed

CHECKPOINT_BYTES = 470 * 2**20  # A network of three classes and its momentum


@pytest.fixture(scope="module")
def alone(shard_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One worker, one epoch, never disturbed."""
    return undisturbed(shard_set, tmp_path_factory.mktemp("alone"), 1, 1)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=False)
    if made.returncode != 0:
        pytest.skip("needs the right to mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.long
def test_a_killed_worker_a_stopped_driver_and_a_hanging_worker_change_nothing(
    pair: Path, shard_set: Path, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    first = Run(shard_set, str(tmp_path), 2, 2, notes=notes)
    first.wait_for("epoch 1/2 step 3/5")
    os.kill(first.worker(), signal.SIGKILL)
    first.wait_for("failure 1 of at most 4: rank ")
    assert "starting again from the last checkpoint" in first.lines[-1]
    first.wait_for("epoch 2/2 step 1/5")
    first.process.terminate()
    assert first.end() == 1, first.text
    assert "SIGTERM to the driver: writing a checkpoint, then leaving" in first.text
    error = first.lines[-1]
    epoch, step = last(str(tmp_path / "run"))
    assert (epoch, step) >= (1, 1)
    assert error == (
        f"error: stopped after epoch {epoch}, step {step}, with a checkpoint: run the same command again to continue\n"
    )

    second = Run(shard_set, str(tmp_path), 2, 2, notes=notes, RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S="6")
    second.wait_for(f"continuing after epoch {epoch}, step {step}")
    second.wait_for("epoch 2/2 step ")
    os.kill(second.worker(), signal.SIGSTOP)
    second.wait_for("failure 1 of at most 4: rank ")
    assert "WorkerHealthCheckTimeoutError: A worker health check has been hanging for" in second.lines[-1]
    assert second.end() == 0, second.text
    assert_alike(pair, str(tmp_path / "run"), shard_set, 2, 2, notes)


@pytest.mark.long
def test_a_full_disk_is_one_line_and_changes_nothing(alone: Path, shard_set: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", str(int(1.5 * CHECKPOINT_BYTES))) as disk:
        first = Run(shard_set, str(disk), 1, 1, notes=tmp_path / "notes")
        assert first.end() == 1, first.text
        line = first.lines[-1]
        assert line.startswith(f"error: {disk}/run could not be written (")
        assert "No space left on device" in line
        assert last(str(disk / "run")) == (0, 2)

        subprocess.run(["mount", "-o", "remount,size=4g", disk], check=True)
        second = Run(shard_set, str(disk), 1, 1, notes=tmp_path / "notes")
        second.wait_for("continuing after epoch 0, step 2")
        assert second.end() == 0, second.text
        assert_alike(alone, str(disk / "run"), shard_set, 1, 1, tmp_path / "notes")


@pytest.mark.long
def test_a_run_on_s3_is_stopped_resumed_finished_and_known_again(
    alone: Path, shard_set: Path, tmp_path: Path, s3: str
) -> None:
    boto3.client("s3", endpoint_url=f"http://{s3}").create_bucket(Bucket="runs")
    options = f"?region=us-east-1&scheme=http&endpoint_override={s3}"
    storage, run = f"s3://runs/here{options}", f"s3://runs/here/run{options}"
    first = Run(shard_set, storage, 1, 1, notes=tmp_path / "notes")
    first.wait_for("epoch 1/1 step 1/5")
    os.kill(first.worker(), signal.SIGTERM)
    assert first.end() == 1, first.text
    assert "SIGTERM to rank 0 on" in first.text
    epoch, step = last(run)
    assert f"error: stopped after epoch {epoch}, step {step}, with a checkpoint" in first.lines[-1]

    second = Run(shard_set, storage, 1, 1, notes=tmp_path / "notes")
    assert second.end() == 0, second.text
    assert f"continuing after epoch {epoch}, step {step}" in second.text
    assert_alike(alone, run, shard_set, 1, 1, tmp_path / "notes")

    again = Run(shard_set, storage, 1, 1)
    assert again.end() == 0, again.text
    assert "the run run is finished already" in again.text
    other = Run(shard_set, storage, 1, 1, "--lr", "0.02")
    assert other.end() == 1
    assert "lr is 0.02, was 0.01" in other.lines[-1]


def test_a_node_that_does_not_see_the_runs_folder_says_so(tmp_path: Path) -> None:
    check_run_folder(str(tmp_path))
    check_run_folder("s3://runs/here")
    with pytest.raises(StorageError, match=rf"does not see the run's folder {tmp_path}/run: give as --storage a URL"):
        check_run_folder(str(tmp_path / "run"))


def send(uploader: CheckpointUploader, folder: Path) -> Checkpoint:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(2**21))
    return uploader._upload(Checkpoint.from_directory(str(folder)), "checkpoint_0001_000000")


def test_a_storage_that_vanishes_is_not_made_anew_elsewhere(tmp_path: Path) -> None:
    run = tmp_path / "mount" / "run"
    run.mkdir(parents=True)
    uploader = CheckpointUploader(str(run))
    run.parent.rename(tmp_path / "gone")
    with pytest.raises(StorageError, match=r"run could not be written \(the run's folder has vanished\); the checkp"):
        send(uploader, tmp_path / "checkpoint")
    assert not run.exists()


@pytest.mark.parametrize(
    ("options", "reason"), [("remount,ro", "Read-only file system"), ("remount,size=1m", "No space left on device")]
)
def test_a_storage_that_cannot_be_written_is_named(tmp_path: Path, options: str, reason: str) -> None:
    with small_disk(tmp_path / "disk", "4m") as disk:
        run = disk / "run"
        run.mkdir()
        uploader = CheckpointUploader(str(run))
        subprocess.run(["mount", "-o", options, disk], check=True)
        with pytest.raises(StorageError, match=rf"{run} could not be written \(.*{reason}"):
            send(uploader, tmp_path / "checkpoint")
        subprocess.run(["mount", "-o", "remount,rw,size=8m", disk], check=True)
        assert send(uploader, tmp_path / "again").path == f"{run}/checkpoint_0001_000000"
