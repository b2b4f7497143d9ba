"""A run's folder in the storage: uploading checkpoints to it, and taking one out of it."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from pyarrow import fs as arrow_fs
from safetensors import SafetensorError

from jobs.cli.command import log, one_line
from jobs.training import checkpoint
from jobs.training.checkpoint import MODEL_FILE, best, committed, half, is_damage, load_tensors, scan, superfluous
from jobs.training.run_state import STATE_FILE, CheckpointError, DamagedError, RunFingerprint, State
from model.training import Trainer
from pipeline.storage.locations import is_url, join, open_location, shown
from pipeline.storage.remote import delete, empty, write


class StorageError(ValueError):
    """The storage cannot be written."""


class LocalDiskError(ValueError):
    """This node's own disk cannot be written."""


def storage_error(run: str, error: BaseException) -> StorageError:
    """The error for a failed write in a run's folder."""
    return StorageError(
        f"{shown(run)} could not be written ({one_line(error)}); the checkpoints before are intact: free space there "
        "or repair it, then run the same command again to continue"
    )


@contextlib.contextmanager
def local_disk() -> Iterator[None]:
    """Makes a failed write to this node's temporary folder a LocalDiskError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise LocalDiskError(
            f"{tempfile.gettempdir()} on {socket.gethostname()}, where a checkpoint is made before it goes to the "
            f"storage, could not be written ({one_line(error)}): free space there or set TMPDIR to a larger disk, then "
            "run the same command again to continue"
        ) from error


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
        keep: how many of the best checkpoints stay; the newest two do in any case.

    Raises:
        LocalDiskError: if this node's temporary folder cannot be written.
    """

    def __init__(self, run: str, keep: int) -> None:
        self._run = run
        self._keep = keep
        self._filesystem, self._path = open_location(run)
        self._pool = ThreadPoolExecutor(1, "upload")
        self._upload: Future[None] | None = None
        prefix = f"alexnet-trainer-{hashlib.sha256(run.encode()).hexdigest()[:16]}-"
        with local_disk():
            # What a killed worker of this run left. Another user's is not ours to remove.
            for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
                if left.lstat().st_uid == os.getuid():
                    shutil.rmtree(left, ignore_errors=True)
            self._folder = Path(tempfile.mkdtemp(prefix=prefix))

    def save(self, trainer: Trainer, identity: RunFingerprint) -> None:
        """Writes a checkpoint to this node's disk, after the upload of the one before, and starts its upload.

        Raises:
            LocalDiskError: if that fails.
            StorageError: if the upload before failed.
        """
        self.wait()
        progress = trainer.progress
        folder = self._folder / f"{checkpoint.CHECKPOINT_PREFIX}{progress.epoch:04d}_{progress.step:06d}"
        with local_disk():
            folder.mkdir()
            checkpoint.save_tensors(folder, trainer)
        # A copy, as training goes on.
        self._upload = self._pool.submit(self._send, folder, State(identity, copy.deepcopy(progress)))

    def check(self) -> None:
        """Raises what an upload that has ended raised."""
        if self._upload is not None and self._upload.done():
            self._upload.result()

    def wait(self) -> None:
        """Waits until the last checkpoint is committed."""
        if self._upload is not None:
            self._upload.result()

    def close(self) -> None:
        """Lets an upload end, and removes this run's files from the local disk."""
        self._pool.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _send(self, folder: Path, state: State) -> None:
        with local_disk():
            files = checkpoint.digests(folder)
        target = join(self._run, folder.name)
        try:
            if not is_url(self._run) and not os.path.isdir(self._path):
                raise FileNotFoundError("the run's folder has vanished")
            states, _ = scan(self._run)
            # A whole one of this place, as of two stops in a validation, stays: a kill here would leave neither.
            if folder.name not in states:
                # What a killed worker began, or what was found damaged.
                empty(target)
                for name in files:
                    with local_disk():
                        data = (folder / name).read_bytes()
                    write(join(target, name), data)
                # Last, because it makes the folder a checkpoint.
                write(join(target, STATE_FILE), state.to_json(files))
                states[folder.name] = state
        except OSError as error:
            raise storage_error(self._run, error) from error
        shutil.rmtree(folder, ignore_errors=True)
        self._remove_old(states)

    def _remove_old(self, states: dict[str, State]) -> None:
        try:
            for name in [*superfluous(states, self._keep), *half(self._run, states)]:
                # First what makes it a checkpoint, so that half of one is never found.
                delete(join(self._run, name, STATE_FILE))
                self._filesystem.delete_dir(f"{self._path}/{name}")
        # The new one is safe already.
        except OSError as error:
            print(f"warning: an old checkpoint could not be removed: {one_line(error)}", flush=True)


def set_aside(run: str, name: str) -> None:
    """Makes a damaged checkpoint no checkpoint any more; its files stay until training has a later one."""
    filesystem, path = open_location(run)
    filesystem.move(f"{path}/{name}/{STATE_FILE}", f"{path}/{name}/{STATE_FILE}.damaged")


@contextlib.contextmanager
def local_copy(location: str) -> Iterator[Path]:
    """A local folder with the files of the folder at a path or URL."""
    filesystem, path = open_location(location)
    if isinstance(filesystem, arrow_fs.LocalFileSystem):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        arrow_fs.copy_files(path, folder, source_filesystem=filesystem)
        yield Path(folder)


@contextlib.contextmanager
def local_checkpoint(location: str) -> Iterator[tuple[str, Path]]:
    """The checkpoint at a path or URL, or the best one of the run there: its location, and a local folder of its files.

    Raises:
        CheckpointError: if there is neither a checkpoint nor a run with one.
    """
    filesystem, path = open_location(location)
    if filesystem.get_file_info(path).type != arrow_fs.FileType.Directory:
        raise CheckpointError(
            f"{shown(location)} does not exist or is no folder: give a checkpoint_* folder or a run's folder"
        )
    if filesystem.get_file_info(f"{path}/{STATE_FILE}").type != arrow_fs.FileType.File:
        with best_checkpoint(location, committed(location)) as found:
            yield found
        return
    with local_copy(location) as folder:
        try:
            yield location, folder
        except DamagedError as error:
            raise DamagedError(f"{error}: give another checkpoint_* folder of its run") from error


@contextlib.contextmanager
def best_checkpoint(run: str, states: dict[str, State]) -> Iterator[tuple[str, Path]]:
    """A run's best checkpoint whose network is whole, as `local_checkpoint` gives it; damaged ones are logged.

    Args:
        states: the run's checkpoints.

    Raises:
        CheckpointError: if there is none.
    """
    left = dict(states)
    if best(left) is None:
        raise CheckpointError(
            f"{shown(run)} holds no finished epoch's checkpoint: train first, or give another run or checkpoint"
        )
    with contextlib.ExitStack() as copies:
        while (name := best(left)) is not None:
            location, state = join(run, name), left.pop(name)
            try:
                folder = copies.enter_context(local_copy(location))
                load_tensors(folder, MODEL_FILE, state)
            except (DamagedError, OSError) as error:
                if not is_damage(error, run):
                    raise
                log(f"warning: {name} is left out: {one_line(error)}")
            else:
                yield location, folder
                return
    raise CheckpointError(
        f"no checkpoint at an epoch's end of {shown(run)} is whole: train to the next epoch's end first"
    )
