"""Reads a .caffemodel: the few fields of src/caffe/proto/caffe.proto that hold layers and their weights.

Google's protobuf reads the file; only the description of those fields is ours. Caffe's own package, which has the whole
of it, is not maintained and needs Caffe. A `bytes` field takes a packed array of floats as it lies in the file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory
from torch import Tensor

from model.weights.interchange import CaffeLayer, InterchangeError

_FIELDS: dict[str, dict[str, tuple[int, str]]] = {
    "BlobShape": {"dim": (1, "repeated int64")},
    "BlobProto": {
        "num": (1, "int32"),
        "channels": (2, "int32"),
        "height": (3, "int32"),
        "width": (4, "int32"),
        "data": (5, "bytes"),
        "shape": (7, "BlobShape"),
    },
    "LayerParameter": {
        "name": (1, "string"),
        "type": (2, "string"),
        "blobs": (7, "repeated BlobProto"),
    },
    # The format of 2014, in which BVLC's two networks were published.
    "V1LayerParameter": {
        "name": (4, "string"),
        "type": (5, "int32"),
        "blobs": (6, "repeated BlobProto"),
    },
    "NetParameter": {
        "name": (1, "string"),
        "layers": (2, "repeated V1LayerParameter"),
        "layer": (100, "repeated LayerParameter"),
    },
}
"""Message -> field -> (number, type), as in caffe.proto."""

_V1_TYPES = {4: "Convolution", 14: "InnerProduct", 15: "LRN", 17: "Pooling"}  # V1LayerParameter.LayerType


def _net_parameter() -> type[message.Message]:
    """The class of caffe.NetParameter, made of _FIELDS."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="caffe_weights.proto", package="caffe", syntax="proto2")
    for name, fields in _FIELDS.items():
        described = file.message_type.add(name=name)
        for field_name, (number, kind) in fields.items():
            repeated, _, kind = kind.rpartition(" ")
            added = described.field.add(name=field_name, number=number)
            added.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            if kind in _FIELDS:
                added.type_name = f".caffe.{kind}"
            else:
                added.type = getattr(field, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("caffe.NetParameter"))


def read_caffemodel(data: bytes, name: str) -> list[CaffeLayer]:
    """Every layer of a .caffemodel of the current format or that of 2014, in the file's order.

    Args:
        data: the file's bytes.
        name: what to call it in an error.

    Raises:
        InterchangeError: if the file is no .caffemodel.
    """
    net: Any = _net_parameter()()
    try:
        net.ParseFromString(data)
    except message.DecodeError as error:
        raise InterchangeError(f"{name} is no .caffemodel or is cut short: {error}") from error
    layers = [
        CaffeLayer(layer.name, kind, tuple(_tensor(blob, f"{name}, {layer.name}") for blob in layer.blobs))
        for layer, kind in [(layer, layer.type) for layer in net.layer]
        + [(layer, _V1_TYPES.get(layer.type, str(layer.type))) for layer in net.layers]
    ]
    if not any(layer.blobs for layer in layers):
        raise InterchangeError(f"{name} is no .caffemodel with weights: it has {len(layers)} layers of Caffe's formats")
    return layers


def _tensor(blob: Any, where: str) -> Tensor:
    """A blob's float32 values in its own shape."""
    shape = list(blob.shape.dim) if blob.HasField("shape") else [blob.num, blob.channels, blob.height, blob.width]
    values = np.frombuffer(blob.data, "<f4")
    if values.size != np.prod(shape):
        raise InterchangeError(f"{where}: a blob of shape {shape} holds {values.size} values")
    return torch.from_numpy(values.copy()).reshape(shape)
