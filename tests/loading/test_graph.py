"""The GPU's graph without a GPU: defined, serialized, and each operator's placement read from DALI's protobuf."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.unknown_fields import UnknownFieldSet

from pipeline.loading.graph import define

# Field numbers of dali.proto: PipelineDef, OpDef, InputOutput, Argument.
PIPELINE_OP, PIPELINE_OUTPUT = 5, 7
OP_NAME, OP_INPUT, OP_OUTPUT, OP_ARGUMENT = 1, 2, 3, 4
EDGE_NAME, EDGE_DEVICE, EDGE_ARGUMENT = 1, 2, 4
ARGUMENT_NAME, FLOATS, INTS, BOOLS = 1, 3, 4, 6
# Where in this program's source an operator was written is no part of what it does.
IGNORED = ("_origin_stack",)
IMAGES = "__ExternalSource_0"


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
    message = list(fields(define(lambda: None, 8, 2, device, None, **kind).serialize()))
    operators = [operator(value) for key, value in message if key == PIPELINE_OP]
    return operators, dict(edge(value) for key, value in message if key == PIPELINE_OUTPUT)


DECODER, CROP = ("decoders__Image", "mixed"), ("CropMirrorNormalize", "gpu")


@pytest.mark.parametrize(
    ("kind", "work"),
    [
        ({}, [DECODER, CROP]),
        ({"pixels": True}, [CROP]),
        ({"ten_crop": True}, [DECODER, *[CROP] * 10, ("Stack", "gpu")]),
    ],
)
def test_images_are_decoded_once_and_augmented_on_the_gpu(kind: dict[str, bool], work: list[tuple[str, str]]) -> None:
    operators, outputs = serialized("gpu", **kind)
    # What hands in images and numbers, and takes the numbers of the samples apart.
    given = [op for op in operators if op.name in ("ExternalSource", "_TensorSubscript", "Cast")]
    assert {op.device for op in given} == {"cpu"}
    assert [(op.name, op.device) for op in operators if op not in given] == work
    assert outputs == operators[-1].outputs
    assert list(outputs.values()) == ["gpu"]
    # No copy is hidden between two operators: each takes its inputs where they lie. Pixels are copied as they come in.
    lies = {name: where for op in operators for name, where in op.outputs.items()}
    lies |= {IMAGES: "gpu"} if "pixels" in kind else {}
    assert all(op.inputs.items() <= lies.items() for op in operators)


@pytest.mark.parametrize("kind", [{}, {"pixels": True}, {"ten_crop": True}])
def test_cpu_and_gpu_differ_in_the_device_alone(kind: dict[str, bool]) -> None:
    """So what the CPU's batches are, as `test_loader.py` compares them, the GPU's are too."""
    on_gpu, on_cpu = serialized("gpu", **kind)[0], serialized("cpu", **kind)[0]
    assert [(op.name, op.arguments, list(op.inputs), op.tensors) for op in on_gpu] == [
        (op.name, op.arguments, list(op.inputs), op.tensors) for op in on_cpu
    ]
    assert {op.device for op in on_cpu} == {"cpu"}


@pytest.mark.parametrize(("name", "load"), [("cuda", 0.0), ("hardware", 1.0)])
def test_one_decoder_takes_every_image(name: Literal["cuda", "hardware"], load: float) -> None:
    (decoder,) = [op for op in serialized("gpu", gpu_decoder=name)[0] if op.name == DECODER[0]]
    assert np.array(decoder.argument("hw_decoder_load", FLOATS), np.uint32).view(np.float32).tolist() == [load]
    # nvJPEG interpolates chroma, as libjpeg-turbo does, only when this is set; and no decoder turns images by EXIF.
    assert decoder.argument("jpeg_fancy_upsampling", BOOLS) == [1]
    assert decoder.argument("adjust_orientation", BOOLS) == [0]
    for buffer in ("device_memory_padding", "host_memory_padding"):
        assert decoder.argument(buffer, INTS) == [2**20]
