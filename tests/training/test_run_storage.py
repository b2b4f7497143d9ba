"""Uploading checkpoints: what fails is named, what is half there is none, and nothing is left behind."""

from __future__ import annotations

import stat
import subprocess
import tempfile
from pathlib import Path

import fsspec
import pytest
from pyarrow import fs

from jobs.training import checkpoint, run_storage
from jobs.training.run_storage import CheckpointUploader, LocalDiskError, StorageError, check_run_folder
from pipeline.storage import remote, retry
from pipeline.storage.remote import write
from tests.damage import flip_bit, small_disk
from tests.model.test_training import IDENTITY, make_trainer
from tests.shard_sets import s3_options


def send(uploader: CheckpointUploader) -> None:
    uploader.save(make_trainer(), IDENTITY)
    uploader.wait()


def test_a_node_that_does_not_see_the_runs_folder_says_so(tmp_path: Path) -> None:
    check_run_folder(str(tmp_path))
    check_run_folder("s3://runs/here")
    with pytest.raises(StorageError, match=rf"does not see the run's folder {tmp_path}/run: give as --storage a URL"):
        check_run_folder(str(tmp_path / "run"))


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
@pytest.mark.parametrize("part", ["storage", "temporary folder"])
def test_a_disk_that_cannot_be_written_is_named(
    tmp_path: Path, part: str, options: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_disk(tmp_path / "disk", "4m") as disk:
        error: type[ValueError] = StorageError
        run, told = disk / "run", rf"{disk}/run could not be written \(.*{reason}"
        if part == "temporary folder":
            monkeypatch.setattr(tempfile, "tempdir", str(disk))
            run, cure = tmp_path / "run", "free space there or set TMPDIR to a larger disk"
            error, told = LocalDiskError, rf"^{disk} on .*could not be written \(.*{reason}.*{cure}"
        run.mkdir()
        # All of the smaller disk but a page.
        (disk / "other").write_bytes(bytes(2**20 - 4096))
        uploader = CheckpointUploader(str(run), 2)
        subprocess.run(["mount", "-o", options, disk], check=True)
        with pytest.raises(error, match=told):
            send(uploader)
        assert checkpoint.committed(str(run)) == {}
        subprocess.run(["mount", "-o", "remount,rw,size=8m", disk], check=True)
        send(CheckpointUploader(str(run), 2))
        assert list(checkpoint.committed(str(run))) == ["checkpoint_0000_000000"]


def test_what_is_on_its_way_is_for_nobody_else_and_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    killed = CheckpointUploader(str(tmp_path / "run"), 2)
    (first,) = (tmp_path / "tmp").iterdir()
    (tmp_path / "tmp" / "another").mkdir()
    assert stat.S_IMODE(first.stat().st_mode) == 0o700
    uploader = CheckpointUploader(str(tmp_path / "run"), 2)
    # Of the killed one nothing is left, and nobody knew the new name before.
    assert not first.exists()
    send(uploader)
    for one in (uploader, killed):
        one.close()
    assert [path.name for path in (tmp_path / "tmp").iterdir()] == ["another"]


def test_a_store_that_fails_for_a_moment_gets_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = set()

    class Store(fs.FSSpecHandler):
        """Fails the first time that a folder is made, and emptied, and that each file is written."""

        def fail_once(self, what: str) -> None:
            if what not in failed:
                failed.add(what)
                raise ConnectionError(what)

        def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
            self.fail_once("empty")
            super().delete_dir_contents(path, missing_dir_ok)

        def create_dir(self, path: str, recursive: bool) -> None:
            self.fail_once("make")
            super().create_dir(path, recursive)

        def open_output_stream(self, path: str, metadata: object) -> fs.PythonFile:
            self.fail_once(path)
            return super().open_output_stream(path, metadata)

    store = fs.PyFileSystem(Store(fsspec.filesystem("file")))
    for module in (remote, run_storage):
        monkeypatch.setattr(module, "open_location", lambda url: (store, str(tmp_path / url.removeprefix("s3://"))))
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.0)
    send(CheckpointUploader("s3://runs", 2))
    assert len(failed) == 5
    checkpoint.restore(tmp_path / "runs" / "checkpoint_0000_000000", make_trainer(), IDENTITY)


def test_a_half_sent_checkpoint_is_none_and_is_sent_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that dies at the last moment, before the state is there."""

    def die(location: str, data: bytes) -> None:
        if location.endswith("state.json"):
            raise OSError("killed")
        write(location, data)

    with monkeypatch.context() as patch:
        patch.setattr(run_storage, "write", die)
        with pytest.raises(StorageError):
            send(CheckpointUploader(str(tmp_path), 2))
    folder = tmp_path / "checkpoint_0000_000000"
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "optimizer.safetensors"]
    assert checkpoint.committed(str(tmp_path)) == {}
    (folder / "half").touch()
    send(CheckpointUploader(str(tmp_path), 2))
    assert not (folder / "half").exists()
    checkpoint.restore(folder, make_trainer(), IDENTITY)
    assert list(checkpoint.committed(str(tmp_path))) == [folder.name]


@pytest.mark.parametrize("state", ["whole", "set aside", "damaged"])
def test_a_whole_checkpoint_of_the_same_place_is_not_touched_and_a_damaged_one_is_replaced(
    tmp_path: Path, state: str
) -> None:
    send(CheckpointUploader(str(tmp_path), 2))
    (folder,) = tmp_path.iterdir()
    flip_bit(folder / "model.safetensors", 1000)
    if state == "set aside":
        run_storage.set_aside(str(tmp_path), folder.name)
    elif state == "damaged":
        (folder / "state.json").write_text("{")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    send(CheckpointUploader(str(tmp_path), 2))
    assert (before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}) == (state == "whole")
    if state != "whole":
        checkpoint.restore(folder, make_trainer(), IDENTITY)


def test_what_was_half_sent_or_is_damaged_goes_once_a_later_checkpoint_is_there(tmp_path: Path) -> None:
    for name in ("checkpoint_0000_000001", "checkpoint_0000_000002", "checkpoint_0000_000009", "checkpoint_mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    (tmp_path / "checkpoint_0000_000002" / "state.json").write_text("{")
    trainer, uploader = make_trainer(), CheckpointUploader(str(tmp_path), 2)
    trainer.progress.step = 5
    uploader.save(trainer, IDENTITY)
    uploader.wait()
    left = ["checkpoint_0000_000005", "checkpoint_0000_000009", "checkpoint_mine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_old_checkpoints_go_and_one_that_cannot_be_removed_harms_nothing(
    s3: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = f"s3://runs/here{s3_options(s3)}"
    uploader, trainer = CheckpointUploader(run, 1), make_trainer()
    for step in range(1, 6):
        if step == 5:
            assert list(checkpoint.committed(run)) == ["checkpoint_0000_000003", "checkpoint_0000_000004"]
            monkeypatch.setattr(run_storage, "superfluous", lambda *_: ["checkpoint_9999_000000"])
        trainer.progress.step = step
        uploader.save(trainer, IDENTITY)
        uploader.wait()
    assert "checkpoint_0000_000005" in checkpoint.committed(run)
    assert "warning: an old checkpoint could not be removed: " in capsys.readouterr().out
