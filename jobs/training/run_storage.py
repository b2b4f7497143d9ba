"""Uploading checkpoints to a run's folder, and what is done when that or a worker fails."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray.train
from pyarrow import fs as arrow_fs
from ray.train import Checkpoint, CheckpointConsistencyMode, CheckpointUploadMode, ControllerError, UserCallback

from jobs.training.checkpoint import RUN_FILE, SPARE_FILE, STATE_FILE, CheckpointError, best, committed
from pipeline.storage.locations import is_url, join, open_location, shown


class StorageError(ValueError):
    """The storage cannot be written."""


def storage_error(run: str, error: BaseException) -> StorageError:
    """The error for a failed write in a run's folder."""
    return StorageError(
        f"{shown(run)} could not be written ({' '.join(str(error).split())}); the checkpoints before are intact: free "
        "space there or repair it, then run the same command again to continue"
    )


def check_run_folder(run: str) -> None:
    """Raises StorageError if this node does not see the folder that the driver made for the run.

    The driver checks only the nodes that are there when the run starts.
    """
    if not is_url(run) and not os.path.isdir(run):
        raise StorageError(
            f"{socket.gethostname()} does not see the run's folder {run}: give as --storage a URL (s3://, gs://), or a "
            "folder of the same path on a mount that all nodes have"
        )


class CheckpointUploader:
    """Rank 0's checkpoints: written to this node's disk, then uploaded while training continues, one at a time.

    Args:
        run: the run's folder, a path or URL.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._filesystem, self._path = open_location(run)
        # The same folder for each start of the run, so that what a killed worker left is removed.
        name = hashlib.sha256(f"{os.getuid()} {run}".encode()).hexdigest()[:16]
        self._folder = Path(tempfile.gettempdir()) / f"alexnet-trainer-{name}"
        shutil.rmtree(self._folder, ignore_errors=True)
        self._last: Path | None = None

    def new_folder(self, name: str) -> Path:
        """Makes an empty local folder for the next checkpoint, after the upload of the one before."""
        if self._last is not None and self._last.exists():
            self.wait()
        self._last = self._folder / name
        shutil.rmtree(self._last, ignore_errors=True)
        self._last.mkdir(parents=True)
        return self._last

    def upload(self, metrics: dict[str, Any], folder: Path) -> None:
        """Reports a checkpoint and starts its upload, after which the local folder is removed."""
        ray.train.report(
            metrics,
            checkpoint=Checkpoint.from_directory(str(folder)),
            checkpoint_dir_name=folder.name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=self._upload,
        )

    def wait(self) -> None:
        """Waits until every checkpoint is committed: uploaded, and in the run's list."""
        ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)

    def _upload(self, checkpoint: Checkpoint, name: str) -> Checkpoint:
        target = f"{self._path}/{name}"
        try:
            if not is_url(self._run) and not os.path.isdir(self._path):
                raise FileNotFoundError("the run's folder has vanished")
            self._filesystem.create_dir(target)
            arrow_fs.copy_files(checkpoint.path, target, destination_filesystem=self._filesystem)
        except OSError as error:
            raise storage_error(self._run, error) from error
        return Checkpoint(target, self._filesystem)


@dataclasses.dataclass
class FailureReporter(UserCallback):
    """Runs in Ray Train's controller: reports failures, ends a run whose storage fails, and copies its checkpoint list.

    Ray Train writes that list in place: a full disk, or a kill at the wrong moment, leaves only a part of it.
    """

    run: str
    max_failures: int
    failures: int = 0
    preempted: str = ""

    def after_report(self, run_context: object, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        if checkpoint is not None and not is_url(self.run):
            spare = Path(self.run) / SPARE_FILE
            new = spare.with_suffix(".new")
            shutil.copyfile(Path(self.run) / RUN_FILE, new)
            os.replace(new, spare)

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if isinstance(error, StorageError):
                # Ray Train does not retry a controller's error: training the same steps again would not help.
                raise ControllerError(error)
        lost = "; ".join(f"rank {rank}: {_first_line(error)}" for rank, error in sorted(worker_exceptions.items()))
        if any(getattr(_cause(error), "preempted", False) for error in worker_exceptions.values()):
            # Ray Train does not count these as failures, and repeats them until the node is gone.
            if lost != self.preempted:
                print(f"a node was taken: {lost}; starting again from the last checkpoint", flush=True)
            self.preempted = lost
            return
        self.failures += 1
        then = "starting again from the last checkpoint" if self.failures <= self.max_failures else "giving up"
        print(f"failure {self.failures} of at most {self.max_failures + 1}: {lost}; {then}", flush=True)


def _cause(error: BaseException) -> BaseException:
    """The error of Ray Train's health check, or the worker's own."""
    return getattr(error, "health_check_failure", None) or error


def _first_line(error: BaseException) -> str:
    cause = _cause(error)
    lines = str(cause).strip().splitlines() or [""]
    return f"{type(cause).__name__}: {' '.join(lines[0].split())}"


def repair_checkpoint_list(run: str) -> str | None:
    """Replaces a half-written list of checkpoints by the copy that `FailureReporter` made.

    Args:
        run: the run's folder, a path or URL; an object store has no half-written files.

    Returns:
        A message about what was done; None if the list is whole.
    """
    listing, spare = Path(run) / RUN_FILE, Path(run) / SPARE_FILE
    if is_url(run) or not listing.exists() or _parses(listing):
        return None
    if not _parses(spare):
        os.replace(listing, listing.with_suffix(".damaged"))
        return f"the list of checkpoints in {run} was half written, and there was none before: starting anew"
    new = spare.with_suffix(".new")
    shutil.copyfile(spare, new)
    os.replace(new, listing)
    return f"the list of checkpoints in {run} was half written: taking the one before"


def _parses(path: Path) -> bool:
    try:
        json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return True


@contextlib.contextmanager
def local_checkpoint(location: str) -> Iterator[tuple[str, Path]]:
    """The checkpoint at a path or URL, or the best one of the run there: its location, and a local folder of its files.

    Raises:
        CheckpointError: if there is neither a checkpoint nor a run with one.
    """
    filesystem, path = open_location(location)
    if filesystem.get_file_info(path).type != arrow_fs.FileType.Directory:
        raise CheckpointError(
            f"{location} does not exist or is no folder: give a checkpoint_* folder or a run's folder"
        )
    if filesystem.get_file_info(f"{path}/{STATE_FILE}").type != arrow_fs.FileType.File:
        chosen = best(committed(location))
        if chosen is None:
            raise CheckpointError(
                f"{location} holds no finished epoch's checkpoint: train first, or give a checkpoint_* folder"
            )
        location, path = join(location, chosen), f"{path}/{chosen}"
    if isinstance(filesystem, arrow_fs.LocalFileSystem):
        yield location, Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        arrow_fs.copy_files(path, folder, source_filesystem=filesystem)
        yield location, Path(folder)
