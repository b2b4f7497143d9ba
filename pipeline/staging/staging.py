"""Bringing a shard set to a node's own disk, once per node, whatever the number of its processes.

Every shard is hashed on its way and takes its name only when its sha256 is right, so what lies in the folder under a
shard's name is whole: an interrupted staging goes on where it stopped. `dataset.json` is written last.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.dataset.info import (
    DATASET_FILE,
    SPLITS,
    STAGED_FILE,
    DatasetError,
    DatasetInfo,
    ShardRow,
    read_dataset,
    write_json,
)
from pipeline.dataset.sample_index import SampleIndex, index_cure, index_file, index_is_whole, open_index
from pipeline.storage.locations import join, shown
from pipeline.storage.remote import TEMPORARY_SUFFIX, chunks
from pipeline.storage.retry import SourceReadError, retry

STREAMS = 8  # Shards copied at a time: one stream of an object store carries a tenth of what a node's network does.

Report = Callable[[str], None]


def stage(location: str, folder: Path, report: Report, splits: Collection[str] = SPLITS) -> Path:
    """Copies a shard set to FOLDER/FINGERPRINT and returns that path; at once where it is there already.

    Its `dataset.json` is copied once all splits are there, as a later call may have it.

    Args:
        location: a local path or URL of a finished set.
        folder: on a disk of this node.
        report: told in plain words what happens.
        splits: which to copy, of those that the set has.

    Raises:
        DatasetError: if the set is missing, a shard's bytes are wrong at their source, the disk is too small or cannot
            be written, or the source cannot be read after several attempts.
    """
    info = read_dataset(location)
    target = folder / info.fingerprint[:16]
    try:
        with alone_at(target, report, f"stage {shown(location)}"):
            _copy(location, info, target, report, splits)
    except OSError as error:
        raise DatasetError(
            f"staging {shown(location)} to {target} failed: {error}; the same command goes on with what is missing, "
            "once the source can be read and the disk written"
        ) from error
    return target


@contextlib.contextmanager
def alone_at(target: Path, report: Report, task: str) -> Iterator[None]:
    """One process of this node at a time works on a folder; the others wait and say so.

    Args:
        target: the folder; the one that it lies in is made.
        report: told what is waited for.
        task: what the other does, as in "stage s3://BUCKET/SET".
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.parent / f".{target.name}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        report(f"waiting for another process of this node to {task}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def make_folders(target: Path, info: DatasetInfo, need: int, what: str, otherwise: str) -> None:
    """Makes a folder for each split.

    Args:
        need: bytes that are to be written there.
        what: the beginning of the error where they have no room.
        otherwise: what else may be done then than freeing some.

    Raises:
        DatasetError: if the disk has less room.
    """
    for split in info.splits:
        (target / split).mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target).free
    if need > free:
        raise DatasetError(
            f"{what} {need / 1e9:.1f} GB in {target}, which has {free / 1e9:.1f} GB free: free some, {otherwise}"
        )


def _copy(location: str, info: DatasetInfo, target: Path, report: Report, splits: Collection[str]) -> None:
    parts = {split: part for split, part in info.splits.items() if split in splits}
    work = [(split, row) for split, part in parts.items() for row in part.shards]
    missing = [(split, row) for split, row in work if not has_size(target / split / f"{row.name}.tar", row.bytes)]
    indexed = all(index_is_whole(target, split, part) for split, part in parts.items())
    whole = parts == info.splits
    if not missing and indexed and (not whole or (target / DATASET_FILE).exists()):
        return
    need = sum(row.bytes for _, row in missing)
    make_folders(target, info, need, f"staging {shown(location)} needs", "or give a larger disk with --stage")
    report(f"staging {need / 1e9:.2f} GB in {len(missing)} of {len(work)} shards from {shown(location)} to {target}")
    for split in parts:
        copy_index(location, target, split, info)
    # First, so that whoever finds a shard damaged can say where to get it again.
    write_json(target / STAGED_FILE, {"from": shown(location)})
    _copy_shards(location, target, missing, report)
    if whole:
        # What was read at the start, not what may lie there by now.
        write_json(target / DATASET_FILE, info.to_json())


def copy_index(location: str, target: Path, split: str, info: DatasetInfo) -> SampleIndex:
    """Copies a split's sample index from a set into a folder, and opens it.

    Raises:
        DatasetError: if it is missing, or is not the one that `dataset.json` describes.
        OSError: if it cannot be read or written.
    """
    part, name = info.splits[split], index_file(split)
    source = join(location, name)
    if not index_is_whole(target, split, part):
        try:
            _copy_file(source, target / name, part.index_sha256)
        except FileNotFoundError:
            raise DatasetError(f"{shown(source)} is missing: {index_cure(location, split)}") from None
        except DatasetError as error:
            raise DatasetError(f"{shown(source)} is damaged ({error}): {index_cure(location, split)}") from None
    return open_index(target, split, part, len(info.classes))


def _copy_shards(location: str, target: Path, missing: Sequence[tuple[str, ShardRow]], report: Report) -> None:
    """Copies shards, STREAMS at a time, saying how far it is."""
    done = 0
    with concurrent.futures.ThreadPoolExecutor(STREAMS) as pool:
        futures = [pool.submit(copy_shard, location, target, split, row) for split, row in missing]
        try:
            for number, future in enumerate(concurrent.futures.as_completed(futures), start=1):
                done += future.result().stat().st_size
                if number % max(1, len(missing) // 20) == 0:
                    report(f"staged {number} of {len(missing)} shards, {done / 1e9:.2f} GB")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def has_size(path: Path, size: int) -> bool:
    """Whether a file is there, and whole: what has its name was renamed when it was."""
    return path.exists() and path.stat().st_size == size


def copy_shard(location: str, target: Path, split: str, row: ShardRow) -> Path:
    """Copies one shard's tar from a set into a folder, and returns it.

    Raises:
        DatasetError: if it is not the one that `dataset.json` describes.
        OSError: if it cannot be read or written.
    """
    tar = target / split / f"{row.name}.tar"
    source = join(location, split, tar.name)
    try:
        _copy_file(source, tar, row.sha256, row.bytes)
    except DatasetError as error:
        said = f"is not the shard that {DATASET_FILE} describes ({error}): copy it there again"
        raise DatasetError(f"{shown(source)} {said}") from None
    return tar


def _copy_file(source: str, target: Path, sha256: str, limit: float = math.inf) -> None:
    """Copies a file, and gives it its name once its sha256 is right.

    Args:
        limit: how many bytes it may have: there is room on the disk for so many.

    Raises:
        DatasetError: if the source gives the same wrong bytes twice; the message is a clause about them.
        OSError: if it cannot be read or written.
    """
    temporary = target.with_name(f".{target.name}{TEMPORARY_SUFFIX}")
    wrong: set[str] = set()

    def attempt() -> None:
        digest = hashlib.sha256()
        try:
            with temporary.open("wb") as file:
                for chunk in chunks(source):
                    digest.update(chunk)
                    file.write(chunk)
                    if file.tell() > limit:
                        break
                size = file.tell()
                file.flush()
                os.fsync(file.fileno())
            found = digest.hexdigest()
            if found == sha256:
                temporary.replace(target)
                return
        finally:
            # A disk that is full, as may be why, shall have its room back.
            temporary.unlink(missing_ok=True)
        said = f"its sha256 is {found[:12]}..., not {sha256[:12]}..."
        if size > limit:
            said = f"it has more than {limit} bytes"
        # Other wrong bytes each time are the network's fault.
        if found in wrong:
            raise DatasetError(said)
        wrong.add(found)
        raise SourceReadError(f"checksum mismatch, corrupt at the source or in transfer: {said}")

    retry(attempt, shown(source))
