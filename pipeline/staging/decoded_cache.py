"""A decoded cache: a set's JPEGs decoded once to a node's own disk, so that an epoch only crops, flips and shifts.

Each shard becomes one file of 256 x 256 x 3 uint8 images, written aside and renamed. The sample index then says where
each image lies in these files, and `dataset.json` comes last: an interrupted run goes on where it stopped.
`pixels.json` marks the folder as one of pixels.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.dataset.info import (
    DATASET_FILE,
    DECODED_FILE,
    STAGED_FILE,
    DatasetError,
    DatasetInfo,
    ShardRow,
    read_dataset,
    write_json,
)
from pipeline.dataset.sample_index import (
    SampleIndex,
    describe_index,
    index_file,
    index_is_whole,
    pack_index,
    record_batch,
)
from pipeline.images.decode import IMAGE_BYTES, IMAGE_SHAPE, ImageError, decode_stored
from pipeline.staging.staging import alone_at, copy_index, copy_shard, has_size, make_folders
from pipeline.storage.locations import shown
from pipeline.storage.remote import write_atomically


def stage_pixels(location: str, folder: Path, report: Callable[[str], None], threads: int) -> Path:
    """Decodes a shard set into FOLDER/FINGERPRINT-pixels and returns that path; at once where it is there already.

    Args:
        location: a local path or URL of a finished set.
        folder: on a disk of this node.
        report: told in plain words what happens.
        threads: decoders at work at a time.

    Raises:
        DatasetError: if the set is missing, a shard is not what it says or an image does not decode, or the disk is too
            small.
        OSError: if the source cannot be read.
    """
    info = read_dataset(location)
    # Another name than the JPEG stage's: neither ever looks into the other's folder.
    target = folder / f"{info.fingerprint[:16]}-pixels"
    with alone_at(target, report, f"decode {shown(location)}"):
        _decode_set(location, info, target, report, threads)
    return target


def _decode_set(location: str, info: DatasetInfo, target: Path, report: Callable[[str], None], threads: int) -> None:
    work = [(split, number, row) for split, part in info.splits.items() for number, row in enumerate(part.shards)]
    missing = [
        (split, number, row)
        for split, number, row in work
        if not has_size(target / split / f"{row.name}.rgb", row.samples * IMAGE_BYTES)
    ]
    if not missing and (target / DATASET_FILE).exists():
        there = read_dataset(target)
        if all(index_is_whole(target, split, part) for split, part in there.splits.items()):
            return
    need = sum(row.samples for _, _, row in missing) * IMAGE_BYTES
    otherwise = "give a larger disk with --stage, or stage the JPEGs with --stage-as jpeg"
    make_folders(target, info, need, f"the pixels of {shown(location)} need", otherwise)
    write_json(target / STAGED_FILE, {"from": shown(location)})
    write_json(target / DECODED_FILE, {"fingerprint": info.fingerprint, "image": list(IMAGE_SHAPE), "dtype": "uint8"})
    report(f"decoding {need / 1e9:.2f} GB of pixels, {len(missing)} of {len(work)} shards, into {target}")
    source = target / "source"
    for split in info.splits:
        (source / split).mkdir(parents=True, exist_ok=True)
    indexes = {split: copy_index(location, source, split, info) for split in info.splits}
    # One array for all shards, as large as the largest.
    pixels = np.empty((max((row.samples for _, _, row in missing), default=0), *IMAGE_SHAPE), np.uint8)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        tars = _copied(location, source, [(split, row) for split, _, row in missing])
        for done, ((split, number, row), tar) in enumerate(zip(missing, tars, strict=True), start=1):
            _decode_shard(tar, row, indexes[split], number, pixels, pool)
            tar.unlink()
            write_atomically(target / split / f"{row.name}.rgb", pixels[: row.samples].data)
            if done % max(1, len(missing) // 20) == 0:
                report(f"decoded {done} of {len(missing)} shards")
    splits = {}
    for split, part in info.splits.items():
        rows = [_rows(indexes[split], number) for number in range(len(part.shards))]
        index = pack_index(rows)
        write_atomically(target / index_file(split), index)
        splits[split] = describe_index(part, index)
    shutil.rmtree(source)
    write_json(target / DATASET_FILE, dataclasses.replace(info, splits=splits).to_json())


def _rows(index: SampleIndex, number: int) -> pa.RecordBatch:
    """The index of one shard's pixels. Checksums are 0 and never compared: hashing 192 KB an image costs too much."""
    rows = index.of_shard(number)
    labels = index.labels[rows]
    zeros = np.zeros(len(labels))
    keys = index.keys.slice(rows.start, len(labels))
    return record_batch(keys, zeros, IMAGE_BYTES * np.arange(len(labels)), zeros + IMAGE_BYTES, labels, zeros)


def _copied(location: str, folder: Path, shards: Sequence[tuple[str, ShardRow]]) -> Iterator[Path]:
    """Each shard's tar in turn; the next one arrives while the caller is at work on the one before."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        coming: concurrent.futures.Future[Path] | None = None
        for split, row in shards:
            following = pool.submit(copy_shard, location, folder, split, row)
            if coming is not None:
                yield coming.result()
            coming = following
        if coming is not None:
            yield coming.result()


def _decode_shard(
    tar: Path,
    row: ShardRow,
    index: SampleIndex,
    number: int,
    pixels: NDArray[np.uint8],
    pool: concurrent.futures.Executor,
) -> None:
    """Decodes the images of a shard into the first rows of `pixels`, uint8 [its samples or more, 256, 256, 3]."""
    data = tar.read_bytes()
    rows = index.of_shard(number)
    places = list(zip(*(part[rows].tolist() for part in (index.offsets, index.sizes, index.checksums)), strict=True))
    if len(places) != row.samples:
        raise DatasetError(
            f"the sample index has {len(places)} samples of {row.name}, {DATASET_FILE} says {row.samples}"
        )

    def fill(sample: int) -> None:
        offset, size, crc32 = places[sample]
        jpeg = data[offset : offset + size]
        try:
            if zlib.crc32(jpeg) != crc32:
                raise ImageError("the sample index has another CRC-32 of it")
            pixels[sample] = decode_stored(jpeg)
        except ImageError as error:
            raise DatasetError(f"{row.name}: {index.key(rows.start + sample)}: {error}") from error

    list(pool.map(fill, range(row.samples)))
