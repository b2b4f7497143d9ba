"""Loaders of the same 256 x 256 JPEGs, each timed in a process of its own by `loader_speed`.

    python -m tests.benchmarks.loader_peers --name ours --data SHARDS --work FOLDER --cores 1

With --gpu, ours and DALI's give them on a GPU.

All give batches of 128, float32 [128, 3, 227, 227]: a random window, mirrored or not, less the mean. Ours and DALI's
also draw the color shift, which torchvision and ffcv have not.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import importlib.util
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types
from torchvision.io import ImageReadMode, decode_jpeg

from jobs.cli.command import run
from pipeline.dataset.info import read_dataset
from pipeline.dataset.split_reader import SplitReader
from pipeline.images.decode import IMAGE_SHAPE
from pipeline.loading.graph import PREFETCH
from pipeline.loading.loader import Loader
from pipeline.loading.plan import COLOR_STD, CROP_SIZE, Augmentation
from tests.benchmarks import loader_others as others
from tests.benchmarks import loader_sets
from tests.benchmarks.loader_sets import REPEATS, open_train
from tests.benchmarks.loader_task import BATCH, SHAPE, Batches, PeerConfig

# Batches. By then each buffer was written once: the first use of a page of memory costs more than its reuse.
WARM_UP = 32


def limit(config: PeerConfig, made: Path) -> Batches:
    """libjpeg-turbo decodes the JPEGs whole, in a bare loop of threads; simplejpeg's copy of it, the fastest here."""
    yield from _bare(simplejpeg.decode_jpeg, [image.tobytes() for image in _images(config)], config.cores)


def torchvision_limit(config: PeerConfig, made: Path) -> Batches:
    """The same by torchvision's copy of libjpeg-turbo."""
    decode = functools.partial(decode_jpeg, mode=ImageReadMode.RGB)
    yield from _bare(decode, [torch.from_numpy(image.copy()) for image in _images(config)], config.cores)


def _images(config: PeerConfig) -> Iterator[NDArray[np.uint8]]:
    return (config.reader.image(i) for i in range(len(config.reader)))


def _bare(decode: Callable[[Any], object], encoded: list[Any], threads: int) -> Batches:
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for number, _ in enumerate(pool.map(decode, encoded * REPEATS), start=1):
            if number % BATCH == 0:
                yield None


def decoder(config: PeerConfig, made: Path) -> Batches:
    """DALI's decoder alone, out of memory; nothing is done with the images."""
    jpegs = list(_images(config))
    batches = itertools.cycle([jpegs[i : i + BATCH] for i in range(0, len(jpegs) - BATCH + 1, BATCH)])
    pipeline = Pipeline(BATCH, config.cores, None, prefetch_queue_depth=PREFETCH)
    with pipeline:
        encoded = fn.external_source(source=lambda: next(batches), dtype=types.UINT8, ndim=1, no_copy=True)
        pipeline.set_outputs(fn.decoders.image(encoded, output_type=types.RGB, jpeg_fancy_upsampling=True))
    pipeline.build()
    while True:
        pipeline.run()
        yield None


def ours(config: PeerConfig, made: Path) -> Batches:
    """This project's loader."""
    yield from _ours(config, config.reader)


def ours_from_pixels(config: PeerConfig, made: Path) -> Batches:
    """This project's loader, from a stage of decoded pixels."""
    (root,) = made.iterdir()
    yield from _ours(config, open_train(root))


def _ours(config: PeerConfig, reader: SplitReader) -> Batches:
    rgb = read_dataset(config.data).rgb
    loader = Loader(reader, rgb, BATCH, config.device, config.cores, gpu_decoder=config.gpu_decoder)
    for batch in loader.run(config.plan.endless()):
        yield batch.images


def bare_copy(config: PeerConfig, made: Path) -> Batches:
    """Threads copy the windows out of the decoded pixels into one float32 buffer: no mirroring, no mean."""
    (root,) = made.iterdir()
    paths = sorted((root / "train").glob("*.rgb"))
    images = np.concatenate([np.memmap(path, np.uint8, "r").reshape(-1, *IMAGE_SHAPE) for path in paths])
    output = torch.empty(BATCH, CROP_SIZE, CROP_SIZE, 3)

    def copy(samples: NDArray[np.int64], drawn: Augmentation, rows: NDArray[np.int64]) -> None:
        for row in rows:
            top, left = drawn.crops[row]
            window = images[samples[row]][top : top + CROP_SIZE, left : left + CROP_SIZE]
            output[row].copy_(torch.from_numpy(window))

    parts = np.array_split(np.arange(BATCH), config.cores)
    with concurrent.futures.ThreadPoolExecutor(config.cores) as pool:
        for planned in config.plan.endless():
            list(pool.map(functools.partial(copy, planned.samples, planned.draw(planned.samples)), parts))
            yield output.permute(0, 3, 1, 2)


def dali(config: PeerConfig, made: Path) -> Batches:
    """DALI's own reader of WebDataset shards, the same augmentation drawn and done by DALI, memory pooled as here."""
    tars = sorted(map(str, (config.data / "train").glob("*.tar")))
    matrix = COLOR_STD * config.plan.color
    on_gpu = config.device.type == "cuda"
    pipeline = Pipeline(BATCH, config.cores, 0 if on_gpu else None, prefetch_queue_depth=PREFETCH, seed=0)
    with pipeline:
        encoded, _ = fn.readers.webdataset(  # type: ignore[misc]
            paths=tars,
            index_paths=[str(Path(tar).with_suffix(".idx")) for tar in tars],
            ext=["jpg", "cls"],
            random_shuffle=True,
            initial_fill=1000,
            missing_component_behavior="error",
        )
        images = fn.decoders.image_crop(
            encoded,
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB,
            jpeg_fancy_upsampling=True,
            hw_decoder_load=1.0 if config.gpu_decoder == "hardware" else 0.0,
            crop=(CROP_SIZE, CROP_SIZE),
            crop_pos_x=fn.random.uniform(range=(0.0, 1.0)),
            crop_pos_y=fn.random.uniform(range=(0.0, 1.0)),
        )
        mean = types.Constant(np.array(config.mean, np.float32))
        for column in matrix.T:
            mean = mean - fn.random.normal() * types.Constant(column.astype(np.float32))
        images = fn.crop_mirror_normalize(
            images, dtype=types.FLOAT, output_layout="HWC", mirror=fn.random.coin_flip(), mean=mean
        )
        pipeline.set_outputs(images)
    pipeline.build()
    while True:
        (output,) = pipeline.run()
        yield torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2)


@dataclasses.dataclass(frozen=True)
class Peer:
    batches: Callable[[PeerConfig, Path], Batches]
    """(configuration, what was made) -> one pass or an endless one."""
    made: str = ""
    """Name in the work folder of what it reads; "" reads the shard set."""
    make: Callable[[Path, Path], None] | None = None
    """(shard set, target): makes that."""
    package: str | None = None
    """What it needs beyond this project's packages."""


PEERS = {
    "libjpeg-turbo, whole, no more": Peer(limit),
    "torchvision's libjpeg-turbo, whole, no more": Peer(torchvision_limit),
    "DALI's decoder, whole, no more": Peer(decoder),
    "ours": Peer(ours),
    "DALI readers.webdataset": Peer(dali),
    "torchvision ImageFolder": Peer(others.torchvision_folder, "folder", loader_sets.make_folder),
    "webdataset": Peer(others.webdataset, "tars", loader_sets.make_links),
    "timm wds": Peer(others.timm, "tars", loader_sets.make_links, "timm"),
    "litdata": Peer(others.litdata, "litdata", loader_sets.make_litdata, "litdata"),
    "streaming": Peer(others.streaming, "mds", loader_sets.make_mds, "streaming"),
    "ffcv, jpg": Peer(others.ffcv, "jpg.beton", functools.partial(loader_sets.make_ffcv, "jpg"), "ffcv"),
    "bare copy of pixels": Peer(bare_copy, "pixels", loader_sets.make_pixels),
    "ours, pixels": Peer(ours_from_pixels, "pixels", loader_sets.make_pixels),
    "ffcv, raw": Peer(others.ffcv, "raw.beton", functools.partial(loader_sets.make_ffcv, "raw"), "ffcv"),
}


def installed(name: str) -> bool:
    package = PEERS[name].package
    return package is None or importlib.util.find_spec(package) is not None


def measure(batches: Callable[[], Batches], seconds: float) -> float:
    """Images per second between the WARM_UP-th batch of a pass and its last, over as many passes as it takes.

    Raises:
        ValueError: if a batch is not float32 [128, 3, 227, 227], or a pass is too short.
    """
    images, taken = 0, 0.0
    while taken < seconds:
        started, counted = 0.0, 0
        for number, batch in enumerate(batches(), start=1):
            if batch is not None and (batch.shape != SHAPE or batch.dtype != torch.float32):
                raise ValueError(f"a batch is {batch.dtype} {list(batch.shape)}, not float32 {list(SHAPE)}")
            now = time.perf_counter()
            if number == WARM_UP:
                started = now
            elif number > WARM_UP:
                counted, spent = counted + BATCH, now - started
                if taken + spent >= seconds:
                    break
        if not counted:
            raise ValueError(f"a pass has no more than {WARM_UP} batches: give a larger set")
        images, taken = images + counted, taken + spent
    return images / taken


def main(config: PeerConfig) -> None:
    """Prints {"images_per_s": ...} as the last line, or makes what the loader reads.

    Raises:
        ValueError: if there is no such loader.
    """
    if config.name not in PEERS:
        raise ValueError(f"--name {config.name!r} must be one of {', '.join(PEERS)}")
    peer = PEERS[config.name]
    made = config.work / peer.made
    if config.prepare:
        if peer.make is not None and not made.exists():
            part = config.work / f"part-{peer.made}"
            peer.make(config.data, part)
            part.rename(made)
        return
    torch.set_num_threads(1)
    print(json.dumps({"images_per_s": measure(lambda: peer.batches(config, made), config.seconds)}), flush=True)


if __name__ == "__main__":
    run(PeerConfig, main)
