"""Bringing a shard set to a node's own disk, once per node, whatever the number of its processes.

Every shard is hashed on its way and takes its name only when its sha256 is right, so what lies in the folder under a
shard's name is whole: an interrupted staging goes on where it stopped. `dataset.json` is written last.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout
from pyarrow import fs

from pipeline.dataset import (
    DATASET_FILE,
    TEMPORARY_SUFFIX,
    DatasetError,
    DatasetInfo,
    ShardRow,
    parse_dataset,
    write_atomically,
    write_json,
)
from pipeline.storage import open_location, read_text

STREAMS = 8  # Shards copied at a time: one stream of an object store carries a tenth of what a node's network does.
CHUNK = 8 * 2**20  # Bytes
ATTEMPTS = 3

Report = Callable[[str], None]


def read_remote_dataset(location: str) -> DatasetInfo:
    """Reads dataset.json of a set at a local path or URL.

    Raises:
        DatasetError: if there is none, or it cannot be understood.
    """
    filesystem, path = open_location(location)
    try:
        text = read_text(filesystem, f"{path}/{DATASET_FILE}")
    except OSError as error:
        raise DatasetError(
            f"there is no finished shard set at {location}: {DATASET_FILE} cannot be read there ({error}); "
            f"make one with: python jobs/shard_imagenet.py --source IMAGES --output FOLDER, and copy FOLDER there"
        ) from error
    return parse_dataset(text, f"{location}/{DATASET_FILE}")


def stage(location: str, folder: Path, report: Report) -> Path:
    """Copies a shard set to FOLDER/FINGERPRINT and returns that path; at once where it is there already.

    Args:
        location: a local path or URL of a finished set.
        folder: on a disk of this node.
        report: told in plain words what happens.

    Raises:
        DatasetError: if the set is missing, a shard's bytes are wrong at their source, or the disk is too small.
        OSError: if the source cannot be read after several attempts.
    """
    info = read_remote_dataset(location)
    target = folder / info.fingerprint[:16]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f".{target.name}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        report(f"waiting for another process of this node to stage {location}")
        lock.acquire()
    try:
        if not (target / DATASET_FILE).exists():
            _copy(location, info, target, report)
    finally:
        lock.release()
    return target


def _copy(location: str, info: DatasetInfo, target: Path, report: Report) -> None:
    filesystem, path = open_location(location)
    work = [(split, row) for split, part in info.splits.items() for row in part.shards]
    missing = [(split, row) for split, row in work if not _is_whole(target / split / f"{row.name}.tar", row)]
    need = sum(row.bytes for _, row in missing)
    for split in info.splits:
        (target / split).mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target).free
    if need > free:
        raise DatasetError(
            f"staging {location} needs {need / 1e9:.1f} GB in {target}, which has {free / 1e9:.1f} GB free: "
            "free some, or give a larger disk with --stage"
        )
    report(f"staging {need / 1e9:.2f} GB in {len(missing)} of {len(work)} shards from {location} to {target}")
    done = 0
    with concurrent.futures.ThreadPoolExecutor(STREAMS) as pool:
        futures = [pool.submit(_copy_shard, filesystem, path, target, *item) for item in missing]
        try:
            for number, future in enumerate(concurrent.futures.as_completed(futures), start=1):
                done += future.result()
                if number % max(1, len(missing) // 20) == 0:
                    report(f"staged {number} of {len(missing)} shards, {done / 1e9:.2f} GB")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    # What was read at the start, not what may lie there by now.
    write_json(target / DATASET_FILE, info.to_json())


def _is_whole(path: Path, row: ShardRow) -> bool:
    return path.exists() and path.stat().st_size == row.bytes


def _copy_shard(filesystem: fs.FileSystem, path: str, target: Path, split: str, row: ShardRow) -> int:
    """Copies one shard's index and tar, the tar last; the bytes copied."""
    tar = target / split / f"{row.name}.tar"
    for attempt in range(1, ATTEMPTS + 1):
        try:
            write_atomically(tar.with_suffix(".idx"), read_text(filesystem, f"{path}/{split}/{row.name}.idx").encode())
            _copy_tar(filesystem, f"{path}/{split}/{row.name}.tar", tar, row)
            break
        except OSError:
            if attempt == ATTEMPTS:
                raise
    return row.bytes


def _copy_tar(filesystem: fs.FileSystem, source: str, tar: Path, row: ShardRow) -> None:
    digest = hashlib.sha256()
    temporary = tar.with_name(f".{tar.name}{TEMPORARY_SUFFIX}")
    with filesystem.open_input_stream(source) as stream, temporary.open("wb") as file:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != row.sha256:
        temporary.unlink()
        raise DatasetError(
            f"{source} is not the shard that {DATASET_FILE} describes (its sha256 is {digest.hexdigest()[:12]}..., not "
            f"{row.sha256[:12]}...): copy it there again"
        )
    temporary.replace(tar)
