"""A stage of decoded pixels: a set's JPEGs decoded once, so that an epoch only cuts, mirrors and shifts.

Each shard becomes one file of 256 x 256 x 3 uint8 images, memory-mapped when it is read, and one small JSON with its
labels, keys, size and sha256. The pixels are written aside and renamed, the JSON follows, `dataset.json` comes last: an
interrupted staging goes on where it stopped. `pixels.json` marks the folder as one of pixels.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import itertools
import json
import mmap
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyarrow import fs

from pipeline.dataset import (
    DATASET_FILE,
    IMAGE_SIZE,
    DatasetError,
    DatasetInfo,
    ShardRow,
    write_atomically,
    write_json,
)
from pipeline.decode import ImageError, decode, refuse_other_size
from pipeline.shard_file import allow_open_files
from pipeline.shard_index import parse_index
from pipeline.split_reader import Classes, SplitReader, place_of
from pipeline.staging import alone_at, chunks, read_remote_dataset
from pipeline.storage import open_location, read_text, shown

KIND_FILE = "pixels.json"
IMAGE_SHAPE = (IMAGE_SIZE, IMAGE_SIZE, 3)
IMAGE_BYTES = IMAGE_SIZE * IMAGE_SIZE * 3


def is_pixel_stage(root: Path) -> bool:
    """Whether a folder holds decoded pixels, finished or not."""
    return (root / KIND_FILE).exists()


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
    info = read_remote_dataset(location)
    # Another name than the JPEG stage's: neither ever looks into the other's folder.
    target = folder / f"{info.fingerprint[:16]}-pixels"
    with alone_at(target, report, f"decode {shown(location)}"):
        if not (target / DATASET_FILE).exists():
            _decode_set(location, info, target, report, threads)
    return target


def _decode_set(location: str, info: DatasetInfo, target: Path, report: Callable[[str], None], threads: int) -> None:
    filesystem, path = open_location(location)
    work = [(split, row) for split, part in info.splits.items() for row in part.shards]
    for split in info.splits:
        (target / split).mkdir(parents=True, exist_ok=True)
    missing = [(split, row) for split, row in work if not _is_whole(target / split, row)]
    need = sum(row.samples for _, row in missing) * IMAGE_BYTES
    free = shutil.disk_usage(target).free
    if need > free:
        raise DatasetError(
            f"the pixels of {shown(location)} need {need / 1e9:.1f} GB in {target}, which has {free / 1e9:.1f} GB "
            "free: free some, give a larger disk with --stage, or stage the JPEGs with --stage-as jpeg"
        )
    write_json(target / KIND_FILE, {"fingerprint": info.fingerprint, "image": list(IMAGE_SHAPE), "dtype": "uint8"})
    report(f"decoding {need / 1e9:.2f} GB of pixels, {len(missing)} of {len(work)} shards, into {target}")
    classes = Classes(info)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for number, (split, row) in enumerate(missing, start=1):
            _decode_shard(filesystem, path, target, split, row, classes, pool)
            if number % max(1, len(missing) // 20) == 0:
                report(f"decoded {number} of {len(missing)} shards")
    write_json(target / DATASET_FILE, info.to_json())


def _is_whole(folder: Path, row: ShardRow) -> bool:
    """Whether a shard's JSON, which is written after its pixels, is there and of this shard."""
    try:
        _read_description(folder, row)
    except DatasetError:
        return False
    return True


def _decode_shard(
    filesystem: fs.FileSystem,
    path: str,
    target: Path,
    split: str,
    row: ShardRow,
    classes: Classes,
    pool: concurrent.futures.Executor,
) -> None:
    source = f"{path}/{split}/{row.name}"
    data = bytearray()
    for chunk in chunks(filesystem, f"{source}.tar"):
        data += chunk
        if len(data) > row.bytes:
            break
    tar = np.frombuffer(data, np.uint8)
    digest = hashlib.sha256(tar.data).hexdigest()
    if digest != row.sha256:
        raise DatasetError(
            f"{source}.tar is not the shard that {DATASET_FILE} describes (its sha256 is {digest[:12]}..., not "
            f"{row.sha256[:12]}...): copy it there again"
        )
    index = parse_index(read_text(filesystem, f"{source}.idx").encode(), f"{source}.idx")
    if len(index) != row.samples:
        raise DatasetError(f"{source}.idx lists {len(index)} samples, {DATASET_FILE} says {row.samples}")
    index.refuse_beyond(len(tar), f"{source}.tar")
    labels = classes.labels((tar[at : at + size].tobytes() for at, size in index.labels), index, f"{source}.tar")

    def pixels_of(sample: int) -> NDArray[np.uint8]:
        offset, size = index.images[sample]
        jpeg, where = tar[offset : offset + size], f"{source}.tar: {index.name(sample)}"
        try:
            refuse_other_size(jpeg)
            return decode(jpeg.tobytes())
        except ImageError as error:
            raise DatasetError(f"{where}: {error}") from error

    images = list(pool.map(pixels_of, range(len(index))))
    pixels = np.stack(images) if images else np.zeros((0, *IMAGE_SHAPE), np.uint8)
    write_atomically(target / split / f"{row.name}.rgb", pixels.tobytes())
    write_json(
        target / split / f"{row.name}.json",
        {
            "source_sha256": row.sha256,
            "bytes": pixels.nbytes,
            "sha256": hashlib.sha256(pixels.data).hexdigest(),
            "labels": labels.tolist(),
            "keys": [index.key(sample) for sample in range(len(index))],
        },
    )


def _read_description(folder: Path, row: ShardRow) -> dict[str, Any]:
    """A shard's JSON, checked against its file of pixels.

    Raises:
        DatasetError: if either is missing or they do not belong together.
    """
    path = folder / f"{row.name}.rgb"
    advice = f"remove {folder.parent} and stage the set again"
    try:
        found: dict[str, Any] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        size = path.stat().st_size
        wanted = row.samples * IMAGE_BYTES
        if not size == found["bytes"] == wanted or not len(found["labels"]) == len(found["keys"]) == row.samples:
            raise DatasetError(f"{path} has {size} bytes, its shard's {row.samples} images make {wanted}: {advice}")
        if found["source_sha256"] != row.sha256:
            raise DatasetError(f"{path} was decoded from another shard than {DATASET_FILE} lists: {advice}")
    except FileNotFoundError as error:
        raise DatasetError(f"{error.filename} is missing: {advice}") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DatasetError(f"{path.with_suffix('.json')} cannot be understood ({error}): {advice}") from error
    return found


class PixelReader:
    """One split's decoded images, memory-mapped.

    `labels` is int32 [samples]; `image(i)` is sample i as a read-only uint8 [256, 256, 3] view, not a copy.

    Args:
        opening: called before each shard is opened.

    Raises:
        DatasetError: if a shard is missing or does not match its description.
        OSError: if more shards are to be opened than the system lets a process open.
    """

    def __init__(self, root: Path, info: DatasetInfo, split: str, opening: Callable[[], None] = lambda: None) -> None:
        if split not in info.splits:
            raise DatasetError(f"the shard set {root} has no {split} split")
        self.split = split
        # Every image was checked when its shard was decoded.
        self.unchecked = 0
        self._folder = root / split
        self._maps: list[NDArray[np.uint8]] = []
        self._rows = [row for row in info.splits[split].shards if row.samples]
        self._first = list(itertools.accumulate((row.samples for row in self._rows), initial=0))
        # Of each shard when its file has been looked at: what dataset.json says is not trusted with memory.
        labels = [np.empty(0, np.int32)]
        # A map keeps its file open.
        allow_open_files(len(self._rows))
        for row in self._rows:
            opening()
            labels.append(np.array(_read_description(self._folder, row)["labels"], np.int32))
            with (self._folder / f"{row.name}.rgb").open("rb") as file:
                mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
            self._maps.append(mapped.reshape(-1, *IMAGE_SHAPE))
        self.labels = np.concatenate(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, sample: int) -> NDArray[np.uint8]:
        """One sample's pixels, uint8 [256, 256, 3]: a read-only view into its mapped shard."""
        shard, number = place_of(sample, self._first)
        return self._maps[shard][number]

    def key(self, sample: int) -> str:
        """A sample's file name in its shard, less its extension, read from the shard's description.

        Raises:
            DatasetError: if that is gone or does not fit the pixels any more.
        """
        shard, number = place_of(sample, self._first)
        return str(_read_description(self._folder, self._rows[shard])["keys"][number])


def open_split(
    root: Path, info: DatasetInfo, split: str, opening: Callable[[], None] = lambda: None
) -> SplitReader | PixelReader:
    """The reader that fits what the folder holds: JPEGs or decoded pixels.

    Args:
        opening: called before each shard is opened.
    """
    return (PixelReader if is_pixel_stage(root) else SplitReader)(root, info, split, opening)
