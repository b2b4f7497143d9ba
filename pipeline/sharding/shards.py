"""Builds one shard: its tar, its index and its annotation.

A shard is three files: NAME.tar, NAME.idx and, written last, NAME.json. All are written aside and renamed, and their
bytes depend on the images, their order and the settings alone, so a job that was killed goes on where it stopped: a
shard whose annotation is there and whose files match it is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.dataset.annotation import Reject, ShardAnnotation, ShardError, read_annotation
from pipeline.dataset.info import write_json
from pipeline.dataset.sample_index import index_of, shard_rows
from pipeline.images.decode import ImageError
from pipeline.images.isolation import IsolatedConverter, KilledError, convert_or_exit
from pipeline.images.resize import Converted, encoder_settings
from pipeline.images.rgb_stats import RgbMoments
from pipeline.sharding.claim import Claim
from pipeline.sharding.pack import pack
from pipeline.sharding.read_ahead import readings
from pipeline.sharding.shard_plan import ShardPlan, inputs_digest, shard_file
from pipeline.sources.files import read_bytes, state_of
from pipeline.sources.listing import Entries, Entry
from pipeline.storage.locations import Location, is_url, join
from pipeline.storage.remote import delete, read, write
from pipeline.storage.retry import SourceReadError

# What is wrong with one file and stays so. Any other failure to read is the disk's or the network's, and is not the
# image's fault: setting the image aside for it would make the set depend on luck.
_FILE_ERRORS = frozenset(
    (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
)
STEP_EVERY_S = 1.0

Convert = Callable[[bytes, int], Converted]
"""An image's bytes and a JPEG quality -> the image as it is stored."""


@dataclasses.dataclass(frozen=True)
class BuiltShard:
    """What building a shard came to."""

    annotation: ShardAnnotation
    kept: bool
    """Whether it was there already, from an earlier run."""
    rows: pa.RecordBatch
    """Its part of the sample index (`sample_index.shard_rows`)."""


class Step(NamedTuple):
    """How far a shard is."""

    images: int
    """Dealt with so far, those set aside included."""
    rejected: int
    """Set aside so far."""
    image: str
    """Which one comes next."""


def build_in_steps(
    root: Location,
    plan: ShardPlan,
    image: dict[str, Any],
    careful: bool = False,
    claim: Claim | None = None,
) -> Iterator[Step | BuiltShard]:
    """Writes one shard into ROOT/SPLIT/, or keeps the one that is there if it is what would be written.

    Yields now and then how far it is, and in the end the shard. Holds one shard in memory. Images that cannot be read
    or do not decode are set aside, with a reason.

    Args:
        image: `encoder_settings` of the whole set.
        careful: convert in a child process, so that an image at which the decoder crashes is no more than bad, and name
            each image before it is touched. Slower: for a shard at which a worker has died.
        claim: the job's on ROOT, looked at again before anything is written.

    Raises:
        ShardSetError: if another job has claimed ROOT.
        ShardError: if an image must be encoded and this machine would not encode as `image` says, an image or a tar of
            the source has changed since it was listed, or, being careful, decoding an image was ended from outside.
        SourceReadError: if the source's disk or network failed.
        OSError: if the shard cannot be written.
    """
    inputs = inputs_digest(plan, image)
    here = encoder_settings(image["quality"])
    samples: list[tuple[str, int, bytes]] = []
    rejected: list[Reject] = []
    moments = RgbMoments()
    with contextlib.ExitStack() as stack:
        converter = stack.enter_context(IsolatedConverter()).convert if careful else convert_or_exit
        if found := _find_shard(root, plan, inputs, image["quality"], converter):
            yield found
            return
        _check_tars(plan.entries)
        told = time.monotonic()
        for entry, get in readings(plan.entries, _read):
            if careful or time.monotonic() - told >= STEP_EVERY_S:
                yield Step(len(samples) + len(rejected), len(rejected), entry.where)
                told = time.monotonic()
            try:
                data = get()
                converted = _convert(entry, data, image["quality"], converter)
            except ImageError as error:
                rejected.append(Reject(entry.where, plan.split, entry.wnid, str(error)))
                continue
            # An image that is stored as it came needs no encoder.
            if here != image and converted.jpeg != data:
                raise ShardError(
                    f"{plan.name} must be encoded by {_versions(image)}, as the rest of the set, and "
                    f"{socket.gethostname()} has {_versions(here)}: install the set's versions on all nodes and run "
                    "the same command again; the shards that are there can be kept"
                )
            samples.append((entry.key, entry.label, converted.jpeg))
            moments += converted.moments
        _check_tars(plan.entries)
        tar, index = pack(samples) if samples else (b"", "")
        digest = hashlib.sha256(tar).hexdigest()
        annotation = ShardAnnotation(plan.name, len(samples), len(tar), digest, inputs, moments, tuple(rejected))
        # While this shard was packed a second job, for the same set, may have written it to a store.
        if is_url(root) and (found := _find_shard(root, plan, inputs, image["quality"], converter)):
            yield found
            return
    if claim is not None:
        claim.check(root)
    if not is_url(root):
        os.makedirs(join(root, plan.split), exist_ok=True)
    # An older annotation must not vouch for a tar that is about to change.
    delete(shard_file(root, plan, "json"))
    for suffix, data in (("tar", tar), ("idx", index.encode())):
        if samples:
            write(shard_file(root, plan, suffix), data)
        else:
            delete(shard_file(root, plan, suffix))
    write_json(shard_file(root, plan, "json"), annotation.to_json())
    yield BuiltShard(annotation, kept=False, rows=shard_rows(tar, index))


def _find_shard(root: Location, plan: ShardPlan, inputs: str, quality: int, converter: Convert) -> BuiltShard | None:
    """A shard that is there, whole, and what `plan` would give; None otherwise."""
    try:
        annotation = read_annotation(shard_file(root, plan, "json"))
        tar = read(shard_file(root, plan, "tar")) if annotation.samples else b""
        index = read(shard_file(root, plan, "idx")) if annotation.samples else b""
    except (ShardError, FileNotFoundError):
        return None
    stated = (annotation.inputs, annotation.bytes, annotation.sha256)
    if stated != (inputs, len(tar), hashlib.sha256(tar).hexdigest()):
        return None
    if annotation.samples and index != index_of(tar).encode():
        return None
    # A file may have been repaired without changing its size, as by allowing to read it.
    entries = {entry.where: entry for entry in plan.entries}
    for reject in annotation.rejected:
        if reject.path not in entries:
            return None
        try:
            entry = entries[reject.path]
            _convert(entry, _read(entry), quality, converter)
        except ImageError:
            continue
        return None
    return BuiltShard(annotation, kept=True, rows=shard_rows(tar, index.decode()))


def _check_tars(entries: Entries) -> None:
    """Makes sure that no tar was replaced or changed since it was listed: its images may lie elsewhere now.

    A tar at a URL is not looked at: each look would cost a request, and for 1000 class tars as many a shard as images.
    """
    for path, then in entries.tar_states.items():
        try:
            now = state_of(path)
        except OSError as error:
            raise SourceReadError(
                f"{path} cannot be reached: {error.strerror}; run the same command again to continue"
            ) from error
        if now != then:
            raise ShardError(
                f"{path} is not the file that was listed ({then.size:,} bytes of {then.mtime_ns / 1e9:.3f}, now "
                f"{now.size:,} bytes of {now.mtime_ns / 1e9:.3f}): leave it as it is, on a cluster the same with the "
                "same time on every node, and run the same command again"
            )


def _read(entry: Entry) -> bytes:
    try:
        data = read_bytes(entry.path, entry.offset, entry.size)
    except OSError as error:
        # A tar that is gone is no fault of one image in it, nor is a folder: its disk may not be mounted.
        gone = not is_url(entry.path) and not os.path.isdir(os.path.dirname(entry.path))
        if entry.offset is None and error.errno in _FILE_ERRORS and not gone:
            raise ImageError(f"it cannot be read: {error.strerror}") from error
        why = f" on {socket.gethostname()}, which has no such folder" if gone else ""
        raise SourceReadError(
            f"reading {entry.where} failed{why}: {error.strerror or error}; run the same command again to continue"
            f"{' once every node has the source' if gone else ''}"
        ) from error
    if len(data) != entry.size:
        raise ShardError(
            f"{entry.where} has {len(data)} bytes and had {entry.size} when it was listed: run the same command again"
        )
    return data


def _convert(entry: Entry, data: bytes, quality: int, converter: Convert) -> Converted:
    """What an image becomes; `entry` names it where its converter is killed."""
    try:
        return converter(data, quality)
    except KilledError as error:
        raise ShardError(
            f"{entry.where}: {error}, as the system does where memory is short; give fewer --workers or remove the "
            "image, and run the same command again to continue"
        ) from error


def _versions(image: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in image["encoder"].items())
