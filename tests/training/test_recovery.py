"""Real faults while a real run trains: nothing is lost but the steps since the last checkpoint.

Each ends with the weights of a run that was never disturbed, bit for bit, having seen each image once an epoch.
"""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import tempfile
from pathlib import Path

import boto3
import pytest

from jobs.training import checkpoint, run_storage
from jobs.training.run_storage import CheckpointUploader, LocalDiskError, StorageError, check_run_folder
from tests.damage import flip_bit, small_disk
from tests.model.test_training import IDENTITY, make_trainer
from tests.processes import below, listening
from tests.runs import Run, assert_alike, last, undisturbed

CHECKPOINT_BYTES = 470 * 2**20  # A network of three classes and its momentum


@pytest.fixture(scope="module")
def alone(shard_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One worker, one epoch, never disturbed."""
    return undisturbed(shard_set, tmp_path_factory.mktemp("alone"), 1, 1)


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


def tracebacks(run: Run) -> list[str]:
    """Those that a run printed, but for the controller's, which may complain of a busy machine."""
    return [line for line in run.lines if "Traceback" in line and "TrainController" not in line]


@pytest.mark.slow
def test_a_failing_worker_a_killed_command_a_killed_controller_and_a_damaged_checkpoint_change_nothing(
    pair: Path, shard_set: Path, tmp_path: Path
) -> None:
    run, notes = tmp_path / "run", tmp_path / "notes"
    (tmp_path / "notes.fault").touch()
    killed = Run(shard_set, str(tmp_path), 2, 2, notes=notes)
    # A failure that is no damage costs the steps since the last checkpoint, and one of --max-failures.
    killed.wait_for("failure 1 of at most 4: rank 1: ")
    assert "out of memory" in killed.lines[-1]
    killed.wait_for(" step ")
    while not checkpoint.committed(str(run)):
        killed.wait_for(" step ")
    # The kernel's own table of a Ray that a command starts for itself, and of training in it.
    addresses = listening(killed.process.pid)
    os.killpg(killed.process.pid, signal.SIGKILL)
    killed.end()
    # The GCS, the raylet's two, the controller, the two ranks' and their Gloo's, and the store's.
    assert len(addresses) >= 9
    # 127.x.y.z, little-endian; as IPv4, or mapped into IPv6.
    assert [a for a in addresses if not re.fullmatch(r"(0{16}FFFF0000)?[0-9A-F]{6}7F", a)] == []
    assert last(str(run)) < (2, 0)

    # As the kernel ends the controller when memory is short; and the newest checkpoint then has a bit flipped.
    second = Run(shard_set, str(tmp_path), 2, 2, checkpoint_every=1, notes=notes)
    second.wait_for("continuing after epoch ")
    second.wait_for("epoch 2/2 step ")
    while len(checkpoint.committed(str(run))) < 2:
        second.wait_for(" step ")
    controllers = [pid for pid, line in below(second.process.pid).items() if "TrainController" in line]
    os.kill(controllers[0], signal.SIGKILL)
    assert second.end() == 1, second.text
    assert second.lines[-1].startswith("error: Ray Train's controller died ("), second.text
    assert second.lines[-1].endswith("; the same command continues from the last checkpoint\n")
    assert not tracebacks(second)
    (_, before), (name, _) = list(checkpoint.committed(str(run)).items())[-2:]
    newest = run / name / "model.safetensors"
    flip_bit(newest, newest.stat().st_size // 2)

    # From decoded pixels now: what a stage holds must not matter.
    stage = ["--stage", tmp_path / "disk", "--stage-as", "pixels"]
    third = Run(shard_set, str(tmp_path), 2, 2, *stage, checkpoint_every=0, notes=notes)
    third.wait_for(f"warning: {newest} is damaged: its sha256 is not the one in state.json; taking the checkpoint")
    third.wait_for(f"continuing after epoch {before.progress.epoch}, step {before.progress.step}, with")
    assert third.end() == 0, third.text
    assert "of pixels" in third.text
    # Ray Train's actors that look after clusters would complain, for want of a dashboard or of their own accord.
    assert "PlacementGroupCleaner" not in third.text
    assert "PreemptionWatcher" not in third.text
    assert_alike(pair, str(run), shard_set, 2, 2, notes)


@pytest.mark.long
def test_a_full_temporary_folder_ends_a_run_with_one_line(shard_set: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        run = Run(shard_set, str(tmp_path / "runs"), 1, 1, TMPDIR=str(disk), RAY_TMPDIR="/tmp")
        assert run.end() == 1, run.text
        assert run.lines[-1].startswith(f"error: {disk} on "), run.text
        assert "No space left on device" in run.lines[-1]
        assert not tracebacks(run)
        assert not list((tmp_path / "runs" / "run").glob("checkpoint_*"))


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


def send(uploader: CheckpointUploader) -> None:
    uploader.save(make_trainer(), IDENTITY)
    uploader.wait()


def test_a_storage_that_vanishes_is_not_made_anew_elsewhere(tmp_path: Path) -> None:
    run = tmp_path / "mount" / "run"
    run.mkdir(parents=True)
    uploader = CheckpointUploader(str(run), 2)
    run.parent.rename(tmp_path / "gone")
    with pytest.raises(StorageError, match=r"run could not be written \(the run's folder has vanished\); the checkp"):
        send(uploader)
    assert not run.exists()


@pytest.mark.parametrize(
    ("options", "reason"), [("remount,ro", "Read-only file system"), ("remount,size=1m", "No space left on device")]
)
def test_a_storage_that_cannot_be_written_is_named(tmp_path: Path, options: str, reason: str) -> None:
    with small_disk(tmp_path / "disk", "4m") as disk:
        run = disk / "run"
        run.mkdir()
        # All of the smaller disk but a page.
        (disk / "other").write_bytes(bytes(2**20 - 4096))
        uploader = CheckpointUploader(str(run), 2)
        subprocess.run(["mount", "-o", options, disk], check=True)
        with pytest.raises(StorageError, match=rf"{run} could not be written \(.*{reason}"):
            send(uploader)
        assert checkpoint.committed(str(run)) == {}
        subprocess.run(["mount", "-o", "remount,rw,size=8m", disk], check=True)
        uploader = CheckpointUploader(str(run), 2)
        send(uploader)
        assert list(checkpoint.committed(str(run))) == ["checkpoint_0000_000000"]


@pytest.mark.parametrize("options", ["remount,ro", "remount,size=1m"])
def test_a_full_temporary_folder_is_named_and_the_storage_is_not(
    tmp_path: Path, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    with small_disk(tmp_path / "disk", "4m") as disk:
        monkeypatch.setattr(tempfile, "tempdir", str(disk))
        (disk / "other").write_bytes(bytes(2**20 - 4096))
        uploader = CheckpointUploader(str(tmp_path / "run"), 2)
        subprocess.run(["mount", "-o", options, disk], check=True)
        reason = "Read-only file system" if "ro" in options else "No space left on device"
        cure = "free space there or set TMPDIR to a larger disk"
        with pytest.raises(LocalDiskError, match=rf"{disk} on .*could not be written \(.*{reason}.*{cure}") as raised:
            send(uploader)
        assert str(tmp_path / "run") not in str(raised.value)
        assert not any((tmp_path / "run").iterdir())


def test_what_is_on_its_way_is_for_nobody_else_and_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    killed = CheckpointUploader(str(tmp_path / "run"), 2)
    (tmp_path / "tmp" / "another").mkdir()
    (first,) = set((tmp_path / "tmp").iterdir()) - {tmp_path / "tmp" / "another"}
    assert stat.S_IMODE(first.stat().st_mode) == 0o700
    uploader = CheckpointUploader(str(tmp_path / "run"), 2)
    # Of the killed one nothing is left, and nobody knew the new name before.
    assert not first.exists()
    send(uploader)
    (folder,) = set((tmp_path / "tmp").iterdir()) - {tmp_path / "tmp" / "another"}
    assert list(folder.iterdir()) == []
    uploader.close()
    killed.close()
    assert [path.name for path in (tmp_path / "tmp").iterdir()] == ["another"]


def test_a_half_sent_checkpoint_is_none_and_is_sent_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that dies at the last moment, before the state is there."""
    uploader = CheckpointUploader(str(tmp_path), 2)

    def die(*_: object) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(run_storage, "write", die)
        with pytest.raises(StorageError):
            send(uploader)
    folder = tmp_path / "checkpoint_0000_000000"
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "optimizer.safetensors"]
    assert checkpoint.committed(str(tmp_path)) == {}
    (folder / "half").touch()
    send(CheckpointUploader(str(tmp_path), 2))
    assert not (folder / "half").exists()
    trainer = make_trainer()
    checkpoint.restore(folder, trainer, IDENTITY)
    assert list(checkpoint.committed(str(tmp_path))) == [folder.name]


def test_an_old_checkpoint_that_cannot_be_removed_harms_nothing(
    s3: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    boto3.client("s3", endpoint_url=f"http://{s3}").create_bucket(Bucket="runs")
    run = f"s3://runs/here?region=us-east-1&scheme=http&endpoint_override={s3}"
    uploader, trainer = CheckpointUploader(run, 1), make_trainer()
    for step in range(1, 5):
        trainer.progress.step = step
        uploader.save(trainer, IDENTITY)
    uploader.wait()
    assert list(checkpoint.committed(run)) == ["checkpoint_0000_000003", "checkpoint_0000_000004"]
    monkeypatch.setattr(run_storage, "superfluous", lambda *_: ["checkpoint_9999_000000"])
    trainer.progress.step = 5
    uploader.save(trainer, IDENTITY)
    uploader.wait()
    assert "checkpoint_0000_000005" in checkpoint.committed(run)
    assert "warning: an old checkpoint could not be removed: " in capsys.readouterr().out
