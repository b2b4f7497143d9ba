"""Other people's AlexNets: their tensors, by name and layout, as those of `model.alexnet.AlexNet`.

Both sources saw BGR pixels (Caffe decodes with OpenCV, and jiecaoyu read Caffe's LMDBs), so the first layer's input
channels are turned round. Everything else lies as torch has it: convolutions [out, in / groups, height, width], fully
connected layers [out, in], and fc6's inputs in the order channel, row, column.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from model.alexnet import AlexNet

CAFFE_MEAN = (122.67891434, 116.66876762, 104.00698793)
"""Mean r, g, b (0..255) of Caffe's data/ilsvrc12/imagenet_mean.binaryproto, over its 256 x 256 positions."""

JIECAOYU = {
    "conv1": "features.0",
    "conv2": "features.4",
    "conv3": "features.8",
    "conv4": "features.10",
    "conv5": "features.12",
    "fc6": "classifier.0",
    "fc7": "classifier.3",
    "fc8": "classifier.6",
}
"""Our layers' names in networks/model_list/alexnet.py of jiecaoyu/pytorch_imagenet."""


class InterchangeError(ValueError):
    """A file that is not one of the known networks."""


@dataclasses.dataclass(frozen=True)
class CaffeLayer:
    """One layer of a .caffemodel."""

    name: str
    kind: str
    """Convolution, InnerProduct, LRN, Pooling, ...; as the layer types of Caffe's current format are called."""
    blobs: tuple[Tensor, ...] = ()
    """float32: the weights, then the biases."""


@dataclasses.dataclass(frozen=True)
class Imported:
    """A network in our own names."""

    description: str
    normalization: str
    """One of `model.recipe.NORMALIZATIONS`."""
    tensors: dict[str, Tensor]
    """By the names of AlexNet's parameters, RGB, float32."""

    @property
    def classes(self) -> int:
        return len(self.tensors["fc8.bias"])


def from_caffe(layers: Sequence[CaffeLayer]) -> Imported:
    """The network of a bvlc_alexnet or bvlc_reference_caffenet file, told apart by what comes first, norm or pool.

    Raises:
        InterchangeError: if it is neither; it names the first difference.
    """
    named = {layer.name: layer for layer in layers}
    kinds = tuple(layer.kind for layer in layers if layer.kind in ("LRN", "Pooling"))
    orders = {
        ("LRN", "Pooling", "LRN", "Pooling", "Pooling"): ("bvlc_alexnet", "caffe"),
        ("Pooling", "LRN", "Pooling", "LRN", "Pooling"): ("bvlc_reference_caffenet", "caffenet"),
    }
    if kinds not in orders:
        raise InterchangeError(
            f"its pooling and LRN layers are {', '.join(kinds) or 'missing'}: it is neither bvlc_alexnet nor "
            "bvlc_reference_caffenet"
        )
    network, normalization = orders[kinds]
    tensors = {}
    for name in JIECAOYU:
        if name not in named or len(named[name].blobs) != 2:
            raise InterchangeError(f"it has no layer {name} with weights and biases; a fine-tuned network may not fit")
        weight, bias = named[name].blobs
        # Older files give every blob four dimensions: [1, 1, out, in] and [1, 1, 1, out].
        tensors[f"{name}.weight"] = weight if name.startswith("conv") else weight.reshape(weight.shape[-2:])
        tensors[f"{name}.bias"] = bias.reshape(-1)
    return Imported(f"{network} of Caffe", normalization, _fitted(tensors))


def from_jiecaoyu(state: Mapping[str, object]) -> Imported:
    """The network of jiecaoyu/pytorch_imagenet's alexnet.pth.tar; `state` is the file's contents.

    Raises:
        InterchangeError: if it is another one.
    """
    inner = state.get("state_dict", state)
    if not isinstance(inner, Mapping):
        raise InterchangeError("its state_dict is no mapping of names to tensors")
    # Trained with DataParallel around the convolutions, as their main.py does, "features.0" is "features.module.0".
    named = {str(name).replace("module.", ""): tensor for name, tensor in inner.items()}
    expected = {f"{theirs}.{part}" for theirs in JIECAOYU.values() for part in ("weight", "bias")}
    if named.keys() != expected or not all(isinstance(tensor, Tensor) for tensor in named.values()):
        odd = sorted(named.keys() ^ expected)[:3]
        raise InterchangeError(f"it is not jiecaoyu's AlexNet: {', '.join(odd) or 'a value'} differ(s)")
    tensors = {
        f"{ours}.{part}": named[f"{theirs}.{part}"].float()
        for ours, theirs in JIECAOYU.items()
        for part in ("weight", "bias")
    }
    return Imported("AlexNet of jiecaoyu/pytorch_imagenet", "caffe", _fitted(tensors))


def _fitted(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors for RGB input, if their shapes are those of a two-tower AlexNet and their values are numbers."""
    classes = len(tensors["fc8.bias"])
    if classes < 2:
        raise InterchangeError(f"fc8 tells {classes} class(es) apart: a classifier needs at least two")
    with torch.device("meta"):
        expected = {name: parameter.shape for name, parameter in AlexNet(classes, groups=2).named_parameters()}
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise InterchangeError(f"{name} is {list(tensors[name].shape)}, a two-tower AlexNet's is {list(shape)}")
        if not bool(tensors[name].isfinite().all()):
            raise InterchangeError(f"{name} holds values that are not finite: the file is damaged")
    return {**tensors, "conv1.weight": tensors["conv1.weight"].flip(1)}
