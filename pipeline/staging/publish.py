"""Bringing a finished shard set to an object store, for `jobs/train.py --data URL`.

What counts is what the store gives back, not that it took something: every file is read back and its sha256 compared,
a tar's with the one in `dataset.json`. What lies there already is taken by the same proof, so the same command goes on
where it was stopped. `dataset.json` is written last, so a set that has one there is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

from pyarrow import fs

from pipeline.dataset.info import (
    DATASET_FILE,
    REJECTS_FILE,
    DatasetError,
    DatasetInfo,
    ShardRow,
    parse_dataset,
    read_dataset,
    rebuild_advice,
)
from pipeline.dataset.sample_index import index_file
from pipeline.sharding.pictures import PCA_FILE, SHEET_FILE
from pipeline.staging.staging import CHUNK, chunks, in_streams, read_remote_text
from pipeline.storage.locations import is_http, is_url, open_location, shown
from pipeline.storage.retry import Report, Retry, SourceReadError, reading

BESIDE_SHARDS = (REJECTS_FILE, SHEET_FILE, PCA_FILE)
AGAIN = "run the same command again, which goes on with what is missing"


class StoreError(ValueError):
    """An object store that does not answer, or does not let us list, read or write."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One file of a set."""

    name: str
    """Its path in the set, as train/train-000000.tar."""
    bytes: int
    sha256: str
    cure: str
    """What a person does if the local file has other bytes than these."""


@dataclasses.dataclass(frozen=True)
class Published:
    """What was found and done at the store."""

    files: int
    """Of the set, all of which are there."""
    sent: int
    """How many of them were sent, the others having been there."""
    bytes_sent: int


def check_unwritable(location: str) -> None:
    """Raises ValueError for a destination that is no object store."""
    scheme = location.partition("://")[0]
    if not is_url(location) or is_http(location) or scheme == "file":
        raise ValueError(
            f"--copy-to {shown(location)} is no object store: give a URL that can be written, as s3://BUCKET/SET or "
            "gs://BUCKET/SET; a folder is what --output is for"
        )


def check_destination(location: str) -> None:
    """Looks whether a store answers at all, before hours of work for it; nothing is written.

    Raises:
        StoreError: if it cannot be listed.
        ValueError: for a URL that pyarrow does not know.
    """
    filesystem, path = open_location(location)
    try:
        # S3 may be asked for a prefix that is not there yet, and then tells a bucket that is not; Google's is not told.
        filesystem.get_file_info(fs.FileSelector(path, allow_not_found=filesystem.type_name == "gcs"))
    except FileNotFoundError:
        return
    except OSError as error:
        raise _store_error(f"{shown(location)} cannot be listed", error) from error


def publish(root: Path, location: str, report: Report) -> Published:
    """Copies the finished set in ROOT to a URL, and reads all of it back.

    Args:
        report: told in plain words what happens.

    Raises:
        DatasetError: if ROOT holds no finished set or is damaged, or another set lies at the URL.
        StoreError: if the store fails, after several attempts.
        ValueError: for a URL that pyarrow does not know.
    """
    info = read_dataset(root)
    try:
        return _Copy(root, info, location, report).run()
    except OSError as error:
        raise _store_error(f"copying {root} to {shown(location)} failed", error) from error


def shard_parts(root: Path, split: str, row: ShardRow) -> Iterator[Part]:
    """A shard's index, annotation and tar, the tar last and unread.

    Raises:
        DatasetError: if the index or the annotation cannot be read.
    """
    cure = rebuild_advice(root, split, row.name)
    for suffix in (".idx", ".json"):
        yield part_of(root, f"{split}/{row.name}{suffix}", cure)
    yield Part(f"{split}/{row.name}.tar", row.bytes, row.sha256, cure)


def part_of(root: Path, name: str, cure: str) -> Part:
    """A small file as it is now.

    Raises:
        DatasetError: if it cannot be read.
    """
    with _reading_local(root / name, cure):
        data = (root / name).read_bytes()
    return Part(name, len(data), hashlib.sha256(data).hexdigest(), cure)


class _Copy:
    """One set on its way to one place.

    Args:
        location: the URL.
    """

    def __init__(self, root: Path, info: DatasetInfo, location: str, report: Report) -> None:
        self._root = root
        self._info = info
        self._place = shown(location)
        self._filesystem, self._path = open_location(location)
        self._report = report
        self._retry = Retry(report, "copied")
        self._lock = threading.Lock()
        self._files = 0
        self._sent: dict[str, int] = {}

    def run(self) -> Published:
        dataset = part_of(self._root, DATASET_FILE, AGAIN)
        self._check_another()
        shards = [(split, row) for split, part in self._info.splits.items() for row in part.shards]
        size = sum(row.bytes for _, row in shards)
        self._report(
            f"copying {self._root} to {self._place}: {size / 1e9:.2f} GB in {len(shards)} shards, each read back; "
            "what is right there stays"
        )
        actions = [functools.partial(self._bring_shard, split, row) for split, row in shards]
        in_streams(actions, self._retry, self._report, "compared")
        for split in self._info.splits:
            self._bring(part_of(self._root, index_file(split), AGAIN))
        for name in BESIDE_SHARDS:
            if (self._root / name).exists():
                self._bring(part_of(self._root, name, AGAIN))
        self._bring(dataset)
        return Published(self._files, len(self._sent), sum(self._sent.values()))

    def _check_another(self) -> None:
        """Raises DatasetError if a set with other shards or classes lies there, or one that cannot be told."""
        advice = "give --copy-to another URL, or delete what is there first"
        read = functools.partial(read_remote_text, self._filesystem, f"{self._path}/{DATASET_FILE}")
        try:
            there = parse_dataset(self._retry(read, DATASET_FILE), f"{self._place}/{DATASET_FILE}")
        except FileNotFoundError:
            return
        except ValueError as error:
            raise DatasetError(f"{self._place} holds a set that cannot be read ({error}): {advice}") from error
        if there.fingerprint != self._info.fingerprint:
            raise DatasetError(
                f"{self._place} holds another set (fingerprint {there.fingerprint[:16]}, not "
                f"{self._info.fingerprint[:16]}): {advice}"
            )

    def _bring_shard(self, split: str, row: ShardRow) -> int:
        for part in shard_parts(self._root, split, row):
            self._bring(part)
        return row.bytes

    def _bring(self, part: Part) -> None:
        self._retry(functools.partial(self._attempt, part), part.name)
        with self._lock:
            self._files += 1

    def _attempt(self, part: Part) -> None:
        """Sends a file unless it is there, and makes sure that it is there.

        Raises:
            SourceReadError: if the store fails or gives other bytes back.
            DatasetError: if the local file is not what it should be.
        """
        if self._is_right(part):
            return
        self._send(part)
        with self._lock:
            self._sent[part.name] = part.bytes
        if not self._is_right(part):
            raise SourceReadError(f"{self._place}/{part.name} gives other bytes back than were sent")

    def _is_right(self, part: Part) -> bool:
        """Whether the store gives a file's bytes; of another size it is not read."""
        path = f"{self._path}/{part.name}"
        with reading():
            size = self._filesystem.get_file_info(path).size
        if size != part.bytes:
            return False
        digest = hashlib.sha256()
        for chunk in chunks(self._filesystem, path):
            digest.update(chunk)
        return digest.hexdigest() == part.sha256

    def _send(self, part: Part) -> None:
        # pyarrow cannot abort an upload: closing the stream, as any error in here does, makes an object of what was
        # sent so far. Such a half takes nobody in: its size or sha256 is not right, so the next attempt or run sends
        # the file again, a staging refuses it, and where dataset.json was not there before it is not written after it.
        # Where the store itself refuses a part of an upload, S3 keeps the parts before unseen, until a lifecycle rule
        # (AbortIncompleteMultipartUpload) removes them.
        digest = hashlib.sha256()
        path = self._root / part.name
        with _reading_local(path, part.cure):
            size = path.stat().st_size
        if size != part.bytes:
            raise DatasetError(f"{path} is damaged or was changed ({size:,} bytes, not {part.bytes:,}): {part.cure}")
        with reading(), self._filesystem.open_output_stream(f"{self._path}/{part.name}", compression=None) as stream:
            for chunk in _local_chunks(path, part.cure):
                digest.update(chunk)
                stream.write(chunk)
                # Parts of an upload go out in the background, and would heap up in memory before a slow store: to one
                # of 20 MB/s a file of 403 MB took 34 MB so, and 267 MB without.
                stream.flush()
        if digest.hexdigest() != part.sha256:
            raise DatasetError(
                f"{path} is damaged or was changed (its sha256 is {digest.hexdigest()[:12]}..., not "
                f"{part.sha256[:12]}...): {part.cure}"
            )


def _local_chunks(path: Path, cure: str) -> Iterator[bytes]:
    with _reading_local(path, cure), path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


@contextlib.contextmanager
def _reading_local(path: Path, cure: str) -> Iterator[None]:
    """Makes any failure within it a DatasetError: it is this machine's fault and not the store's."""
    try:
        yield
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror}): {cure}") from error


def _store_error(what: str, error: OSError) -> StoreError:
    """One line with the cause, and what to do."""
    return StoreError(
        f"{what} ({' '.join(str(error).split())}): see that the URL is right, the bucket exists and your keys "
        f"may list, read and write it, then {AGAIN}"
    )
