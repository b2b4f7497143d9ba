"""Other projects' loaders of the same 256 x 256 JPEGs, for `loader_speed`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image, decode_jpeg
from torchvision.transforms import v2

from pipeline.loading.plan import CROP_SIZE
from tests.benchmarks.loader_sets import REPEATS
from tests.benchmarks.loader_task import BATCH, Batches, PeerConfig


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
    normalize = NormalizeImage(np.array(config.mean), np.ones(3), np.float32)
    steps = [window, RandomHorizontalFlip(), normalize, ToTensor(), ToTorchImage()]
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
