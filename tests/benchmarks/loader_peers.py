"""Loaders of the same 256 x 256 JPEGs, each timed in a process of its own by `loader_speed`.

    python -m tests.benchmarks.loader_peers --name ours --data SHARDS --work FOLDER --cores 1

All give batches of 128, float32 [128, 3, 227, 227]: a random window, mirrored or not, less the mean. Ours and DALI's
also draw the colour shift, which torchvision and ffcv have not.
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
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image, decode_jpeg
from torchvision.transforms import v2

from jobs.cli import run
from pipeline.dataset import read_dataset
from pipeline.loader import PREFETCH, Loader
from pipeline.pixel_stage import PixelReader
from pipeline.plan import COLOUR_STD, CROP_SIZE, Plan, Views, colour_matrix
from pipeline.split_reader import SplitReader
from tests.benchmarks import loader_sets
from tests.benchmarks.loader_sets import REPEATS, open_train

BATCH = 128
WARM_UP = 4  # Batches; a DataLoader's workers have then begun their third each.
SHAPE = (BATCH, 3, CROP_SIZE, CROP_SIZE)


@dataclasses.dataclass(frozen=True)
class PeerConfig:
    name: str
    """One of PEERS."""
    data: Path
    """A shard set on a local disk; its training images are read."""
    work: Path
    """Folder for what the loaders read."""
    cores: int = 1
    """Threads or worker processes."""
    seconds: float = 6.0
    """Measure for at least so long."""
    prepare: bool = False
    """Only make what this loader reads."""

    def __post_init__(self) -> None:
        if self.name not in PEERS:
            raise ValueError(f"--name {self.name!r} must be one of {', '.join(PEERS)}")
        if self.cores < 1 or not self.seconds > 0:
            raise ValueError("--cores and --seconds must be above 0")

    @functools.cached_property
    def reader(self) -> SplitReader:
        return open_train(self.data)

    @functools.cached_property
    def mean(self) -> list[float]:
        """In grey levels."""
        return [255 * value for value in read_dataset(self.data).rgb.mean]

    @functools.cached_property
    def plan(self) -> Plan:
        return Plan(len(self.reader), BATCH, 0, colour_matrix(read_dataset(self.data).rgb))

    def endless(self) -> Iterator[Views]:
        for epoch in itertools.count():
            yield from self.plan.epoch(epoch)


Batches = Iterator[Tensor | None]
"""One pass: a tensor a batch, or None for one that is decoded and no more."""


def limit(config: PeerConfig, made: Path) -> Batches:
    """libjpeg-turbo decodes the JPEGs whole, in a bare loop of threads; simplejpeg's copy of it, the fastest here."""
    encoded = [config.reader.image(i).tobytes() for i in range(len(config.reader))] * REPEATS
    with concurrent.futures.ThreadPoolExecutor(config.cores) as pool:
        for number, _ in enumerate(pool.map(simplejpeg.decode_jpeg, encoded), start=1):
            if number % BATCH == 0:
                yield None


def ours(config: PeerConfig, made: Path) -> Batches:
    """This project's loader."""
    yield from _ours(config, config.reader)


def ours_from_pixels(config: PeerConfig, made: Path) -> Batches:
    """This project's loader, from a stage of decoded pixels."""
    yield from _ours(config, _pixels(config, made))


def _pixels(config: PeerConfig, made: Path) -> PixelReader:
    (root,) = made.iterdir()
    return PixelReader(root, read_dataset(root), "train")


def _ours(config: PeerConfig, reader: SplitReader | PixelReader) -> Batches:
    loader = Loader(reader, read_dataset(config.data).rgb, BATCH, torch.device("cpu"), config.cores)
    for batch in loader.run(config.endless()):
        yield batch.images


def bare_copy(config: PeerConfig, made: Path) -> Batches:
    """Threads copy the windows out of the decoded pixels into one float32 buffer: no mirroring, no mean."""
    reader = _pixels(config, made)
    output = torch.empty(BATCH, CROP_SIZE, CROP_SIZE, 3)

    def copy(views: Views, rows: NDArray[np.int64]) -> None:
        for row in rows:
            top, left = views.crops[row]
            window = reader.image(int(views.samples[row]))[top : top + CROP_SIZE, left : left + CROP_SIZE]
            output[row].copy_(torch.from_numpy(window))

    parts = np.array_split(np.arange(BATCH), config.cores)
    with concurrent.futures.ThreadPoolExecutor(config.cores) as pool:
        for views in config.endless():
            list(pool.map(functools.partial(copy, views), parts))
            yield output.permute(0, 3, 1, 2)


def dali(config: PeerConfig, made: Path) -> Batches:
    """DALI's own reader of WebDataset shards, the same augmentation drawn and done by DALI, memory pooled as here."""
    tars = sorted(map(str, (config.data / "train").glob("*.tar")))
    matrix = COLOUR_STD * config.plan.colour
    pipeline = Pipeline(BATCH, config.cores, None, prefetch_queue_depth=PREFETCH, seed=0)
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
            output_type=types.RGB,
            jpeg_fancy_upsampling=True,
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


def augment(config: PeerConfig) -> Callable[[Any], Tensor]:
    """torchvision's v2 transforms of a uint8 image."""
    window = [v2.RandomCrop(CROP_SIZE), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32)]
    return v2.Compose([v2.ToImage(), *window, v2.Normalize(config.mean, [1.0, 1.0, 1.0])])


def decode_and_augment(transform: Callable[[Any], Tensor], data: bytes) -> Tensor:
    """A JPEG's bytes -> float32 [3, 227, 227], decoded by torchvision."""
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return transform(decode_jpeg(encoded, mode=ImageReadMode.RGB))


def torchvision_folder(config: PeerConfig, made: Path) -> Batches:
    """ImageFolder, decoded by torchvision rather than Pillow, v2 transforms, DataLoader."""
    images = ImageFolder(str(made), augment(config), loader=decode_image)
    sampler = RandomSampler(images, num_samples=REPEATS * len(images))
    for batch, _ in DataLoader(images, BATCH, sampler=sampler, num_workers=config.cores, drop_last=True):
        yield batch


def webdataset(config: PeerConfig, made: Path) -> Batches:
    """webdataset with a shuffle buffer of 1,000, decoded by torchvision, v2 transforms."""
    import webdataset as wds

    tars = sorted(map(str, made.glob("*.tar")))
    images = wds.WebDataset(tars, shardshuffle=len(tars), seed=0, empty_check=False).shuffle(1000)
    images = images.map_dict(jpg=functools.partial(decode_and_augment, augment(config)), cls=int)
    images = images.to_tuple("jpg", "cls").batched(BATCH, partial=False)
    for batch, _ in wds.WebLoader(images, batch_size=None, num_workers=config.cores):
        yield batch


def timm(config: PeerConfig, made: Path) -> Batches:
    """timm's reader of WebDataset shards, which decodes by Pillow, v2 transforms, DataLoader."""
    from timm.data import create_dataset

    total = REPEATS * len(config.reader)
    last = len(list(made.glob("*.tar"))) - 1
    split = f"train-{{000000..{last:06d}}}.tar|{total}"
    images = create_dataset("wds/", str(made), split=split, is_training=True, batch_size=BATCH)
    images.transform = augment(config)
    images.set_loader_cfg(num_workers=config.cores)
    for batch, _ in DataLoader(images, BATCH, num_workers=config.cores, drop_last=True):
        yield batch


def litdata(config: PeerConfig, made: Path) -> Batches:
    """litdata's StreamingDataset of JPEGs, decoded by torchvision, v2 transforms."""
    from litdata import StreamingDataLoader, StreamingDataset

    images = _decoding(StreamingDataset, config)(str(made), shuffle=True, drop_last=True)
    yield from StreamingDataLoader(images, batch_size=BATCH, num_workers=config.cores, drop_last=True)


def _decoding(dataset: type, config: PeerConfig) -> Any:
    """The dataset's class, its samples decoded and augmented."""
    transform = augment(config)

    class Decoding(dataset):
        def __getitem__(self, index: Any) -> Tensor:
            return decode_and_augment(transform, super().__getitem__(index)["jpg"])

    return Decoding


def streaming(config: PeerConfig, made: Path) -> Batches:
    """MosaicML streaming's StreamingDataset of JPEGs, decoded by torchvision, v2 transforms."""
    from streaming import StreamingDataset

    images = _decoding(StreamingDataset, config)(local=str(made), shuffle=True, batch_size=BATCH)
    yield from DataLoader(images, BATCH, num_workers=config.cores, drop_last=True)


def ffcv(config: PeerConfig, made: Path) -> Batches:
    """ffcv, from JPEGs that its writer encoded again at quality 90, or from raw pixels."""
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader as FfcvLoader
    from ffcv.loader import OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage

    # Of the one size and shape that leaves a window of 227 x 227 at random, not resized.
    area = (CROP_SIZE / 256) ** 2
    window = RandomResizedCropRGBImageDecoder((CROP_SIZE, CROP_SIZE), scale=(area, area), ratio=(1.0, 1.0))
    normalise = NormalizeImage(np.array(config.mean), np.ones(3), np.float32)
    steps = [window, RandomHorizontalFlip(), normalise, ToTensor(), ToTorchImage()]
    pipelines = {"image": steps, "label": None}
    order, cores = OrderOption.RANDOM, config.cores
    indices = np.tile(np.arange(len(config.reader), dtype=np.uint64), REPEATS)
    options = {"os_cache": True, "order": order, "indices": indices, "drop_last": True, "pipelines": pipelines}
    batches = iter(FfcvLoader(str(made), batch_size=BATCH, num_workers=cores, **options))
    try:
        for (batch,) in batches:
            yield batch
    finally:
        # A process that ends while its thread runs is aborted.
        batches.close()
        batches.join()


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
    "ours": Peer(ours),
    "DALI readers.webdataset": Peer(dali),
    "torchvision ImageFolder": Peer(torchvision_folder, "folder", loader_sets.make_folder),
    "webdataset": Peer(webdataset, "tars", loader_sets.make_links),
    "timm wds": Peer(timm, "tars", loader_sets.make_links, "timm"),
    "litdata": Peer(litdata, "litdata", loader_sets.make_litdata, "litdata"),
    "streaming": Peer(streaming, "mds", loader_sets.make_mds, "streaming"),
    "ffcv, jpg": Peer(ffcv, "jpg.beton", functools.partial(loader_sets.make_ffcv, "jpg"), "ffcv"),
    "bare copy of pixels": Peer(bare_copy, "pixels", loader_sets.make_pixels),
    "ours, pixels": Peer(ours_from_pixels, "pixels", loader_sets.make_pixels),
    "ffcv, raw": Peer(ffcv, "raw.beton", functools.partial(loader_sets.make_ffcv, "raw"), "ffcv"),
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
    """Prints {"images_per_s": ...} as the last line, or makes what the loader reads."""
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
