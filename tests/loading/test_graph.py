"""The GPU's graph without a GPU: defined, serialized, and each operator's placement read from DALI's protobuf.

And on the CPU, that nothing but the graph touches a pixel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from google.protobuf.empty_pb2 import Empty
from google.protobuf.unknown_fields import UnknownFieldSet

from pipeline.dataset.info import read_dataset
from pipeline.dataset.split_reader import SplitReader
from pipeline.loading.graph import define
from pipeline.loading.loader import Loader
from pipeline.loading.plan import Plan, color_matrix

# Field numbers of dali.proto: PipelineDef, OpDef, InputOutput, Argument.
PIPELINE_OP, PIPELINE_OUTPUT = 5, 7
OP_NAME, OP_INPUT, OP_OUTPUT, OP_ARGUMENT = 1, 2, 3, 4
EDGE_NAME, EDGE_DEVICE, EDGE_ARGUMENT = 1, 2, 4
ARGUMENT_NAME, FLOATS, INTS, BOOLS = 1, 3, 4, 6
# Where in this program's source an operator was written is no part of what it does.
IGNORED = ("_origin_stack",)
IMAGES, NUMBERS = "__ExternalSource_0", "__ExternalSource_1"


@dataclasses.dataclass(frozen=True)
class Operator:
    name: str
    device: str
    """cpu, mixed (host in, GPU out) or gpu."""
    inputs: dict[str, str]
    """The device on which each input is taken, by its name."""
    tensors: dict[str, str]
    """The input that gives each argument of the samples, by the argument's name."""
    outputs: dict[str, str]
    """The device on which each output lies."""
    arguments: dict[str, bytes]
    """All others, as encoded."""

    def argument(self, name: str, field: int) -> list[Any]:
        """An argument's values of one type, by the field's number."""
        return [value for key, value in fields(self.arguments[name]) if key == field]


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Field numbers and values of any protobuf message; of DALI's, no Python class is shipped."""
    empty = Empty()
    empty.ParseFromString(message)
    for field in UnknownFieldSet(empty):
        yield field.field_number, field.data


def edge(message: bytes) -> tuple[str, str]:
    values = dict(fields(message))
    return values[EDGE_NAME].decode(), values[EDGE_DEVICE].decode()


def operator(message: bytes) -> Operator:
    parts = list(fields(message))
    arguments = {dict(fields(value))[ARGUMENT_NAME].decode(): value for key, value in parts if key == OP_ARGUMENT}
    strings = [value for _, value in fields(arguments.pop("device")) if isinstance(value, bytes)]
    edges = [value for key, value in parts if key == OP_INPUT]
    named = {dict(fields(value)).get(EDGE_ARGUMENT, b"").decode(): edge(value)[0] for value in edges}
    return Operator(
        name=next(value.decode() for key, value in parts if key == OP_NAME),
        device=strings[-1].decode(),
        inputs=dict(edge(value) for value in edges),
        tensors={name: source for name, source in named.items() if name},
        outputs=dict(edge(value) for key, value in parts if key == OP_OUTPUT),
        arguments={name: value for name, value in arguments.items() if not name.startswith(IGNORED)},
    )


def serialized(device: Literal["cpu", "gpu"], **kind: Any) -> tuple[list[Operator], dict[str, str]]:
    """The operators, and the graph's outputs with their devices."""
    message = list(fields(define(nothing, 8, 2, device, None, **kind).serialize()))
    operators = [operator(value) for key, value in message if key == PIPELINE_OP]
    return operators, dict(edge(value) for key, value in message if key == PIPELINE_OUTPUT)


def nothing() -> None:
    raise StopIteration


def split(operators: list[Operator]) -> tuple[list[Operator], list[Operator], list[Operator]]:
    """The inputs, what takes the numbers of the samples apart, and what works on images."""
    sources = [op for op in operators if op.name == "ExternalSource"]
    numbers = [op for op in operators if op.name in ("_TensorSubscript", "Cast")]
    return sources, numbers, [op for op in operators if op not in sources and op not in numbers]


def columns(crop: Operator, numbers: list[Operator]) -> dict[str, list[int]]:
    """Which of a sample's numbers each argument of `crop` is: one, or from one up to another."""
    made_by = {name: op for op in numbers for name in op.outputs}
    found = {}
    for argument, name in crop.tensors.items():
        op = made_by[name]
        if op.name == "Cast":
            (name,) = op.inputs
            op = made_by[name]
        assert (op.name, op.inputs) == ("_TensorSubscript", {NUMBERS: "cpu"})
        found[argument] = [
            value for key in ("at_0", "lo_0", "hi_0") if key in op.arguments for value in op.argument(key, INTS)
        ]
    return found


# As `pipeline.loading.graph.define` says: left, top, flip, mean less the color jitter.
PLANNED = {"crop_pos_x": [0], "crop_pos_y": [1], "mirror": [2], "mean": [3, 6]}


def test_on_a_gpu_jpegs_are_decoded_and_augmented_there() -> None:
    operators, outputs = serialized("gpu")
    sources, numbers, (decoder, crop) = split(operators)
    assert [op.device for op in [*sources, *numbers]] == ["cpu"] * (2 + 5)
    assert (decoder.name, decoder.device) == ("decoders__Image", "mixed")
    assert (decoder.inputs, decoder.tensors) == ({IMAGES: "cpu"}, {})
    assert list(decoder.outputs.values()) == ["gpu"]
    assert (crop.name, crop.device) == ("CropMirrorNormalize", "gpu")
    # All that the plan draws, a number a sample, and nothing drawn by DALI.
    assert columns(crop, numbers) == PLANNED
    assert crop.inputs == {**decoder.outputs, **dict.fromkeys(crop.tensors.values(), "cpu")}
    assert outputs == crop.outputs
    assert list(outputs.values()) == ["gpu"]


def test_on_a_gpu_pixels_are_copied_and_augmented_there() -> None:
    operators, outputs = serialized("gpu", pixels=True)
    sources, numbers, (crop,) = split(operators)
    assert [op.device for op in [*sources, *numbers]] == ["cpu"] * (2 + 5)
    assert (crop.name, crop.device, columns(crop, numbers)) == ("CropMirrorNormalize", "gpu", PLANNED)
    assert crop.inputs == {IMAGES: "gpu", **dict.fromkeys(crop.tensors.values(), "cpu")}
    assert outputs == crop.outputs
    assert list(outputs.values()) == ["gpu"]


@pytest.mark.parametrize("pixels", [False, True])
def test_ten_crops_decode_once(pixels: bool) -> None:
    operators, outputs = serialized("gpu", pixels=pixels, ten_crop=True)
    sources, (mean,), work = split(operators)
    assert len(sources) == 2
    decoders = [op for op in work if op.name == "decoders__Image"]
    crops = [op for op in work if op.name == "CropMirrorNormalize"]
    (stack,) = [op for op in work if op not in decoders and op not in crops]
    assert len(decoders) == (0 if pixels else 1)
    assert len(crops) == 10
    assert {op.device for op in [*crops, stack]} == {"gpu"}
    images = IMAGES if pixels else next(iter(decoders[0].outputs))
    assert all(op.inputs == {images: "gpu", **mean.outputs} for op in crops)
    assert all(columns(op, [mean]) == {"mean": [3, 6]} for op in crops)
    assert stack.name == "Stack"
    assert outputs == stack.outputs


@pytest.mark.parametrize("kind", [{}, {"ten_crop": True}])
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_every_operator_takes_its_inputs_where_they_lie(device: Literal["cpu", "gpu"], kind: dict[str, bool]) -> None:
    """No copy is hidden between two operators, and nothing goes from the GPU back to the host."""
    operators, outputs = serialized(device, **kind)
    lies = {name: where for op in operators for name, where in op.outputs.items()}
    for op in operators:
        for name, taken in op.inputs.items():
            assert lies[name] == taken, (op.name, name)
        if op.device == "cpu":
            assert set(op.outputs.values()) == {"cpu"}
    assert outputs.items() <= lies.items()


@pytest.mark.parametrize("kind", [{}, {"pixels": True}, {"ten_crop": True}])
def test_cpu_and_gpu_differ_in_the_device_alone(kind: dict[str, bool]) -> None:
    on_gpu, on_cpu = serialized("gpu", **kind)[0], serialized("cpu", **kind)[0]
    assert [(op.name, op.arguments, list(op.inputs), op.tensors) for op in on_gpu] == [
        (op.name, op.arguments, list(op.inputs), op.tensors) for op in on_cpu
    ]
    assert {op.device for op in on_cpu} == {"cpu"}


@pytest.mark.parametrize(("name", "load"), [("cuda", 0.0), ("hardware", 1.0)])
def test_one_decoder_takes_every_image(name: Literal["cuda", "hardware"], load: float) -> None:
    *_, (decoder, _) = split(serialized("gpu", gpu_decoder=name)[0])
    assert np.array(decoder.argument("hw_decoder_load", FLOATS), np.uint32).view(np.float32).tolist() == [load]
    # nvJPEG interpolates chroma, as libjpeg-turbo does, only when this is set; and no decoder turns images by EXIF.
    assert decoder.argument("jpeg_fancy_upsampling", BOOLS) == [1]
    assert decoder.argument("adjust_orientation", BOOLS) == [0]
    for buffer in ("device_memory_padding", "host_memory_padding"):
        assert decoder.argument(buffer, INTS) == [2**20]


@pytest.mark.parametrize("ten_crop", [False, True])
def test_a_batch_is_what_the_graph_gave(shard_set: Path, monkeypatch: pytest.MonkeyPatch, ten_crop: bool) -> None:
    """To the bit, and in the same memory where torch would have put it: whatever torch did to pixels would show."""
    info = read_dataset(shard_set)
    reader = SplitReader(shard_set, info, "train")
    monkeypatch.setattr("pipeline.loading.loader.GROUP", 200 if ten_crop else 20)
    loader = Loader(reader, info.rgb, 9, torch.device("cpu"), 1, ten_crop=ten_crop)
    run = loader._pipeline.run
    groups: list[tuple[int, bytes]] = []

    def noted(stream: object = None) -> Any:
        outputs = run(stream)
        tensor = outputs[0].as_tensor()
        groups.append((tensor.data_ptr(), np.array(tensor).tobytes()))
        return outputs

    monkeypatch.setattr(loader._pipeline, "run", noted)
    for number, batch in enumerate(loader.run(Plan(45, 9, 3, color_matrix(info.rgb)).epoch(1))):
        assert len(groups) == number // 2 + 1, "two batches make a group"
        pointer, contents = groups[-1]
        size = batch.images.nbytes
        start = number % 2 * size
        assert batch.images.permute(0, 2, 3, 1).numpy().tobytes() == contents[start : start + size]
        # 9 images of 618,348 bytes are no multiple of 64.
        assert (batch.images.data_ptr() == pointer + start) == (start == 0)
        assert batch.images.data_ptr() % 64 == 0
    assert len(groups) == 3


@pytest.mark.parametrize("far_behind", [False, True])
def test_a_batchs_host_memory_is_kept_until_the_gpu_has_read_it(
    shard_set: Path, monkeypatch: pytest.MonkeyPatch, far_behind: bool
) -> None:
    """The GPU's way of handing over, with stand-ins for its stream and for events that are done when they are told.

    Or, of a GPU far behind, only when they are waited for.
    """

    class Event:
        done = False

        def query(self) -> bool:
            return self.done

        def synchronize(self) -> None:
            self.done = True

    class Stream:
        def __init__(self) -> None:
            self.events: list[Event] = []

        def record_event(self) -> Event:
            self.events.append(Event())
            return self.events[-1]

    def viewed(output: Any, device: object) -> torch.Tensor:
        views.append(torch.from_dlpack(output))
        return views[-1]

    info = read_dataset(shard_set)
    reader = SplitReader(shard_set, info, "train")
    planned = list(Plan(45, 5, 3, color_matrix(info.rgb)).epoch(0))
    expected = list(Loader(reader, info.rgb, 5, torch.device("cpu"), 1).run(planned))
    monkeypatch.setattr("pipeline.loading.loader.GROUP", 5)
    views: list[torch.Tensor] = []
    loader, stream = Loader(reader, info.rgb, 5, torch.device("cpu"), 1), Stream()
    run = loader._pipeline.run
    monkeypatch.setattr(loader, "_on_gpu", True)
    monkeypatch.setattr(loader._pipeline, "run", lambda stream=None: run())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch, "as_tensor", viewed)
    used: list[int] = []
    for number, (batch, right) in enumerate(zip(loader.run(planned), expected, strict=True)):
        assert torch.equal(batch.images, right.images)
        assert torch.equal(batch.labels, right.labels)
        # DALI's memory is another group's once DALI runs again.
        assert batch.images.data_ptr() != views[-1].data_ptr()
        used.append(loader._copying[-1][1])
        # The first two events are done late, and then each before the next batch.
        kept = [slot for _, slot in loader._copying]
        assert not set(loader._free) & set(kept)
        if far_behind:
            continue
        assert used[max(0, number - 2) :] == kept
        if number == 2:
            stream.events[0].done = True
        if number >= 3:
            stream.events[number - 2].done = True
