"""The GPU's pipeline without a GPU: defined, serialised, and each operator's placement read from DALI's protobuf."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.unknown_fields import UnknownFieldSet

from pipeline.loader import define

# Field numbers of dali.proto: PipelineDef, OpDef, InputOutput, Argument.
PIPELINE_OP, PIPELINE_OUTPUT = 5, 7
OP_NAME, OP_INPUT, OP_OUTPUT, OP_ARGUMENT = 1, 2, 3, 4
EDGE_NAME, EDGE_DEVICE = 1, 2
ARGUMENT_NAME = 1
DECODER = "decoders__Image"
# Where in this program's source an operator was written is no part of what it does.
IGNORED = ("_origin_stack", "device")


@dataclasses.dataclass(frozen=True)
class Operator:
    name: str
    device: str
    """cpu, mixed (host in, GPU out) or gpu."""
    inputs: dict[str, str]
    """The device on which each input, or argument that is a tensor, is taken."""
    outputs: dict[str, str]
    """The device on which each output lies."""
    arguments: dict[str, bytes]
    """All others, as encoded."""


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
    strings = [value for _, value in fields(arguments["device"]) if isinstance(value, bytes)]
    return Operator(
        name=next(value.decode() for key, value in parts if key == OP_NAME),
        device=strings[-1].decode(),
        inputs=dict(edge(value) for key, value in parts if key == OP_INPUT),
        outputs=dict(edge(value) for key, value in parts if key == OP_OUTPUT),
        arguments={name: value for name, value in arguments.items() if not name.startswith(IGNORED)},
    )


def serialised(device: str, pixels: bool = False) -> tuple[list[Operator], dict[str, str]]:
    """The operators in order, and the pipeline's outputs with their devices."""
    message = list(fields(define(nothing, 8, 2, device, None, pixels).serialize()))
    operators = [operator(value) for key, value in message if key == PIPELINE_OP]
    return operators, dict(edge(value) for key, value in message if key == PIPELINE_OUTPUT)


def nothing() -> None:
    raise StopIteration


def test_on_a_gpu_only_bytes_come_from_the_host() -> None:
    operators, outputs = serialised("gpu")
    sources = [op for op in operators if op.name == "ExternalSource"]
    (decoder,) = [op for op in operators if op.name == DECODER]
    assert {op.device for op in sources} == {"cpu"}
    assert decoder.device == "mixed"
    assert set(decoder.inputs.values()) == {"cpu"}
    assert list(decoder.outputs.values()) == ["gpu"]
    assert operators == [*sources, decoder]
    assert outputs == decoder.outputs


def test_on_a_gpu_decoded_pixels_are_copied_there_and_no_more() -> None:
    operators, outputs = serialised("gpu", pixels=True)
    assert [(op.name, op.device) for op in operators] == [("ExternalSource", "cpu"), ("Copy", "gpu")]
    assert outputs == operators[-1].outputs
    assert list(outputs.values()) == ["gpu"]


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_every_operator_takes_its_inputs_where_they_lie(device: str) -> None:
    """No copy is hidden between two operators, and nothing goes from the GPU back to the host."""
    operators, outputs = serialised(device)
    lies: dict[str, str] = {}
    for op in operators:
        for name, taken in op.inputs.items():
            assert lies[name] == taken, (op.name, name)
        lies |= op.outputs
        if op.device == "cpu":
            assert set(op.outputs.values()) == {"cpu"}
    assert outputs.items() <= lies.items()


def test_cpu_and_gpu_differ_in_the_device_alone() -> None:
    on_gpu, on_cpu = serialised("gpu")[0], serialised("cpu")[0]
    assert [(op.name, op.arguments, list(op.inputs)) for op in on_gpu] == [
        (op.name, op.arguments, list(op.inputs)) for op in on_cpu
    ]
    assert {op.device for op in on_cpu} == {"cpu"}
    (decoder,) = [op for op in on_gpu if op.name == DECODER]
    # nvJPEG interpolates chroma, as libjpeg-turbo does, only when this is set.
    assert dict(fields(decoder.arguments["jpeg_fancy_upsampling"]))[6] == 1
