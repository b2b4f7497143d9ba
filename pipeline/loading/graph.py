"""The DALI graph: what is done to an image on its way into the network, on CPU and GPU from one definition.

`decoders.image`, then `crop_mirror_normalize` with crop position, flip and mean (less the color jitter) of each sample.
DALI draws nothing and shuffles nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal

from nvidia.dali import Pipeline, fn, types

from pipeline.loading.plan import CROP_SIZE, LAST, TEN_CROPS

# DALI leaves host memory of less than 32 MB to malloc, which gives the images of a batch back to the system each time:
# faults on new pages then cost a quarter of the decoding. DALI reads this at its first allocation.
os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", "256k")
PREFETCH = 2  # Batches that DALI keeps ready; two hide the decoder behind the step, more only take memory.
DECODER_BUFFER = 2**20  # Bytes that nvJPEG reserves a thread: a set's image has 196,608. Its defaults are 8 and 16 MiB.

GpuDecoder = Literal["cuda", "hardware"]


def decoder_name(pixels: bool, gpu: bool, gpu_decoder: GpuDecoder = "cuda") -> str:
    """What decides an image's pixels: decoders differ by some levels, so that a run keeps to one.

    Args:
        pixels: whether the images come decoded, as from a cache of pixels: libjpeg-turbo made them on any machine.
    """
    return "libjpeg-turbo" if pixels or not gpu else f"nvjpeg-{gpu_decoder}"


def define(
    source: Callable[[], Any],
    batch_size: int,
    threads: int,
    device: Literal["cpu", "gpu"],
    device_id: int | None,
    *,
    pixels: bool = False,
    ten_crop: bool = False,
    gpu_decoder: GpuDecoder = "cuda",
) -> Pipeline:
    """The graph for batches of up to `batch_size` images, unbuilt. Its output is float32 HWC.

    Args:
        source: called once a batch, returns its two arrays, or raises StopIteration at the end: images (uint8 [n,
            bytes] of JPEGs, or [n, 256, 256, 3] of pixels) and float32 [n, 6] of left and top of the crop as fractions
            of the room for it, flip (0 or 1) and what to subtract from r, g, b. With ten crops, only the last three of
            these count. The arrays must stay as they are until the batch is out.
        batch_size: the largest batch.
        threads: decoder threads on the host.
        device: the operators' only difference.
        device_id: the GPU's index among those this process sees, or None on CPU.
        pixels: images come decoded.
        ten_crop: decode each image once and cut it ten times (section 4.1); the output is [10, 227, 227, 3] an image.
        gpu_decoder: which of nvJPEG's decoders takes every image.
    """
    on_gpu = device == "gpu"
    pipeline = Pipeline(batch_size, threads, device_id, prefetch_queue_depth=PREFETCH)
    with pipeline:
        # Each input costs the thread that trains as much Python as any other, so all numbers are one.
        given, numbers = fn.external_source(
            source=source, num_outputs=2, dtype=[types.UINT8, types.FLOAT], ndim=[3 if pixels else 1, 1], no_copy=True
        )
        if pixels:
            images = given.gpu() if on_gpu else given
        else:
            images = fn.decoders.image(
                given,
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                # libjpeg-turbo, which decodes on the CPU, interpolates chroma; nvJPEG does so only when asked.
                jpeg_fancy_upsampling=True,
                # The stored pixels are what is counted, verified and read by others; DALI would turn them by EXIF.
                adjust_orientation=False,
                # All or nothing. By default a share of each batch goes to the hardware decoder, whose pixels differ: an
                # image would depend on its place in the batch.
                hw_decoder_load=1.0 if gpu_decoder == "hardware" else 0.0,
                device_memory_padding=DECODER_BUFFER,
                host_memory_padding=DECODER_BUFFER,
            )

        mean = numbers[3:6]

        def crop(left: Any, top: Any, flip: Any) -> Any:
            return fn.crop_mirror_normalize(
                images,
                device=device,
                crop=(CROP_SIZE, CROP_SIZE),
                crop_pos_x=left,
                crop_pos_y=top,
                mirror=flip,
                mean=mean,
                dtype=types.FLOAT,
                # Which permuted is torch's channels_last.
                output_layout="HWC",
            )

        if ten_crop:
            output = fn.stack(*(crop(left / LAST, top / LAST, int(flip)) for top, left, flip in TEN_CROPS))
        else:
            output = crop(numbers[0], numbers[1], fn.cast(numbers[2], dtype=types.INT32))
        pipeline.set_outputs(output)
    return pipeline
