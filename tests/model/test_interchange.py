"""Imported weights against Caffe's own arithmetic in plain torch operations; exported ones against ONNX Runtime."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from jobs import evaluate, export, import_weights
from jobs.evaluate import EvaluateConfig
from jobs.export import ExportConfig, ExportError
from jobs.import_weights import ImportConfig
from jobs.training import checkpoint
from jobs.training.worker import make_network
from model.alexnet import AlexNet
from model.weights.caffemodel import read_caffemodel
from model.weights.interchange import CAFFE_MEAN, Imported, InterchangeError, from_caffe
from pipeline.dataset.info import read_dataset

Blobs = dict[str, tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def blobs() -> Blobs:
    """Weights that keep activations in the hundreds, where the constants of LRN matter."""
    generator, found = torch.Generator().manual_seed(5), {}
    with torch.device("meta"):
        network = AlexNet(3, groups=2)
    for name in ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"):
        shape = network.get_parameter(f"{name}.weight").shape
        std = (2.0 / float(np.prod(shape[1:]))) ** 0.5 * (4.0 if name in ("conv1", "conv2") else 1.0)
        weight = torch.empty(shape).normal_(0.0, std, generator=generator)
        found[name] = (weight, torch.empty(shape[0]).normal_(0.0, 1.0, generator=generator))
    return found


def caffes_forward(blobs: Blobs, rgb: Tensor, pool_first: bool) -> Tensor:
    """What Caffe computes: BGR in, pooling rounded up, LRN with k = 1 and alpha over the mean of five squares."""

    def norm(x: Tensor) -> Tensor:
        squares = F.pad(x * x, (0, 0, 0, 0, 2, 2))
        return x / (1.0 + (1e-4 / 5) * sum(squares[:, i : i + x.shape[1]] for i in range(5))) ** 0.75

    def pool(x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 2, ceil_mode=True)

    def norm_and_pool(x: Tensor) -> Tensor:
        return norm(pool(x)) if pool_first else pool(norm(x))

    x = norm_and_pool(F.relu(F.conv2d(rgb[:, [2, 1, 0]], *blobs["conv1"], stride=4)))
    x = norm_and_pool(F.relu(F.conv2d(x, *blobs["conv2"], padding=2, groups=2)))
    x = F.relu(F.conv2d(x, *blobs["conv3"], padding=1))
    x = F.relu(F.conv2d(x, *blobs["conv4"], padding=1, groups=2))
    x = pool(F.relu(F.conv2d(x, *blobs["conv5"], padding=1, groups=2))).flatten(1)
    return F.linear(F.relu(F.linear(F.relu(F.linear(x, *blobs["fc6"])), *blobs["fc7"])), *blobs["fc8"])


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def chunk(number: int, data: bytes) -> bytes:
    """A length-delimited field of protobuf's wire format."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def caffemodel(blobs: Blobs, pool_first: bool, old: bool) -> bytes:
    """A .caffemodel, written by hand: the format of 2014 with four-dimensional blobs, or today's."""

    def blob(tensor: Tensor) -> bytes:
        data = chunk(5, tensor.numpy().astype("<f4").tobytes())
        if not old:
            return chunk(7, chunk(1, b"".join(varint(n) for n in tensor.shape))) + data
        four = (1,) * (4 - tensor.dim()) + tuple(tensor.shape)
        return b"".join(number(i, n) for i, n in enumerate(four, start=1)) + data

    def layer(name: str, kind: str, tensors: tuple[Tensor, ...] = ()) -> bytes:
        body = b"".join(chunk(6 if old else 7, blob(tensor)) for tensor in tensors)
        if old:
            kinds = {"Convolution": 4, "InnerProduct": 14, "LRN": 15, "Pooling": 17}
            return chunk(2, chunk(4, name.encode()) + number(5, kinds[kind]) + body)
        return chunk(100, chunk(1, name.encode()) + chunk(2, kind.encode()) + body)

    out = b""
    for name, pair in blobs.items():
        out += layer(name, "Convolution" if name.startswith("conv") else "InnerProduct", pair)
        if name in ("conv1", "conv2"):
            both = layer(f"norm-{name}", "LRN"), layer(f"pool-{name}", "Pooling")
            out += b"".join(reversed(both) if pool_first else both)
        if name == "conv5":
            out += layer("pool5", "Pooling")
    return out


def saved(value: object, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def jiecaoyus(blobs: Blobs) -> bytes:
    """alexnet.pth.tar, as their main.py of 2017 saves a network trained with DataParallel."""
    places = [*(f"features.module.{i}" for i in (0, 4, 8, 10, 12)), *(f"classifier.{i}" for i in (0, 3, 6))]
    tensors: dict[str, Tensor] = {}
    for place, (weight, bias) in zip(places, blobs.values(), strict=True):
        tensors |= {f"{place}.weight": weight, f"{place}.bias": bias}
    return saved({"epoch": 90, "arch": "alexnet", "state_dict": tensors, "best_prec1": 57.5}, zipped=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "origin", "pool_first"),
    [
        ("old.caffemodel", "bvlc_alexnet of Caffe", False),
        ("new.caffemodel", "bvlc_reference_caffenet of Caffe", True),
        ("alexnet.pth.tar", "AlexNet of jiecaoyu/pytorch_imagenet", False),
    ],
)
def test_imported_weights_compute_what_caffe_computes(
    blobs: Blobs, shard_set: Path, tmp_path: Path, name: str, origin: str, pool_first: bool
) -> None:
    source, folder = tmp_path / name, tmp_path / "imported"
    source.write_bytes(jiecaoyus(blobs) if name.endswith(".tar") else caffemodel(blobs, pool_first, "old" in name))
    import_weights.main(ImportConfig(source, shard_set, folder))
    state = checkpoint.read_state(folder)
    assert state.origin.startswith(f"{origin}, imported from {name} (sha256 ")
    np.testing.assert_allclose(np.array(state.identity.rgb.mean) * 255, CAFFE_MEAN)
    network = make_network(state.identity).eval()
    checkpoint.load_network(folder, network)
    images = 256 * torch.rand(2, 3, 227, 227, generator=torch.Generator().manual_seed(1)) - 115
    with torch.no_grad():
        found, expected = network(images), caffes_forward(blobs, images, pool_first)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("a.caffemodel", b"\xff" * 40, "is no .caffemodel"),
        ("a.caffemodel", b"", "is no .caffemodel"),
        ("a.pth.tar", b"\x80\x02nonsense", "torch.save"),
        ("a.pth.tar", saved({"state_dict": {"features.0.weight": torch.zeros(1)}}), "not jiecaoyu's AlexNet"),
        ("a.pth", saved([torch.zeros(1)]), "it holds a list, and no mapping of names to tensors"),
        ("a.npy", b"", "of no known kind"),
    ],
)
def test_a_file_of_no_known_network_is_refused(tmp_path: Path, name: str, data: bytes, why: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InterchangeError, match=why):
        import_weights.read_source(tmp_path / name)


def test_a_network_that_does_not_fit_is_refused(blobs: Blobs, shard_set: Path) -> None:
    small = {name: (weight[:2], bias[:2]) for name, (weight, bias) in blobs.items()}
    with pytest.raises(InterchangeError, match=r"conv1\.weight is \[2, 3, 11, 11\], a two-tower"):
        from_caffe(read_caffemodel(caffemodel(small, False, False), "small"))
    nine = Imported("another set's", "caffe", {"fc8.bias": torch.zeros(9)})
    with pytest.raises(InterchangeError, match=r"tell 9 classes apart, the set .* has 3"):
        import_weights.describe(nine, read_dataset(shard_set), shard_set)


@pytest.mark.slow
def test_imported_weights_are_evaluated_and_exported(
    blobs: Blobs, shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    source, folder, onnx = tmp_path / "alexnet.pth.tar", tmp_path / "imported", tmp_path / "network.onnx"
    source.write_bytes(jiecaoyus(blobs))
    import_weights.main(ImportConfig(source, shard_set, folder))
    evaluate.main(EvaluateConfig(str(shard_set), str(folder), gpu=False))
    assert "is AlexNet of jiecaoyu/pytorch_imagenet, imported from alexnet.pth.tar" in capsys.readouterr().out
    for path in (onnx, tmp_path / "network.safetensors"):
        export.main(ExportConfig(str(folder), path))
    images = 256 * torch.rand(3, 3, 227, 227, generator=torch.Generator().manual_seed(2)) - 115
    expected = caffes_forward(blobs, images, False).numpy()
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"images": images.numpy()})
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == ["n0", "n1", "n2"]
    with safe_open(tmp_path / "network.safetensors", "pt") as file:
        assert file.metadata()["origin"] == about["origin"]
        assert torch.equal(file.get_tensor("conv1.weight"), blobs["conv1"][0].flip(1))
    # A model that computes something else is not written.
    monkeypatch.setattr(export, "to_onnx", lambda network, about: lambda images: (1.001 * network(images).detach(),))
    with pytest.raises(ExportError, match="ONNX Runtime's logits differ from torch's by"):
        export.main(ExportConfig(str(folder), tmp_path / "other.onnx"))
    assert not (tmp_path / "other.onnx").exists()
