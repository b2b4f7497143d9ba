"""Imported weights against Caffe's own arithmetic in plain torch operations; exported ones against ONNX Runtime."""

from __future__ import annotations

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
from jobs.export import ExportConfig
from jobs.import_weights import ImportConfig
from jobs.training import checkpoint
from jobs.training.worker import make_network
from model.alexnet import AlexNet
from model.weights.interchange import CAFFE_MEAN, InterchangeError

CLASSES = 3
SHAPES = {
    "conv1": (96, 3, 11, 11),
    "conv2": (256, 48, 5, 5),
    "conv3": (384, 256, 3, 3),
    "conv4": (384, 192, 3, 3),
    "conv5": (256, 192, 3, 3),
    "fc6": (4096, 9216),
    "fc7": (4096, 4096),
    "fc8": (CLASSES, 4096),
}
Blobs = dict[str, tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def blobs() -> Blobs:
    """Weights that keep activations in the hundreds, where the constants of LRN matter."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for name, shape in SHAPES.items():
        std = (2.0 / float(np.prod(shape[1:]))) ** 0.5 * (4.0 if name in ("conv1", "conv2") else 1.0)
        weight = torch.empty(shape).normal_(0.0, std, generator=generator)
        found[name] = (weight, torch.empty(shape[0]).normal_(0.0, 1.0, generator=generator))
    return found


def caffes_forward(blobs: Blobs, rgb: Tensor, pool_first: bool) -> Tensor:
    """What Caffe computes: BGR in, pooling rounded up, LRN with k = 1 and alpha over the mean of five squares."""

    def norm_and_pool(x: Tensor) -> Tensor:
        def norm(y: Tensor) -> Tensor:
            squares = F.pad(y * y, (0, 0, 0, 0, 2, 2))
            total = sum(squares[:, i : i + y.shape[1]] for i in range(5))
            return y / (1.0 + (1e-4 / 5) * total) ** 0.75

        def pool(y: Tensor) -> Tensor:
            return F.max_pool2d(y, 3, 2, ceil_mode=True)

        return norm(pool(x)) if pool_first else pool(norm(x))

    x = rgb[:, [2, 1, 0]]
    x = norm_and_pool(F.relu(F.conv2d(x, *blobs["conv1"], stride=4)))
    x = norm_and_pool(F.relu(F.conv2d(x, *blobs["conv2"], padding=2, groups=2)))
    x = F.relu(F.conv2d(x, *blobs["conv3"], padding=1))
    x = F.relu(F.conv2d(x, *blobs["conv4"], padding=1, groups=2))
    x = F.relu(F.conv2d(x, *blobs["conv5"], padding=1, groups=2))
    x = F.max_pool2d(x, 3, 2, ceil_mode=True).flatten(1)
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

    def layer(name: str, kind: str, body: bytes = b"") -> bytes:
        if old:
            kinds = {"Convolution": 4, "InnerProduct": 14, "LRN": 15, "Pooling": 17, "ReLU": 18}
            return chunk(2, chunk(4, name.encode()) + number(5, kinds[kind]) + body)
        return chunk(100, chunk(1, name.encode()) + chunk(2, kind.encode()) + body)

    out = chunk(1, b"AlexNet")
    for name, pair in blobs.items():
        body = b"".join(chunk(6 if old else 7, blob(tensor)) for tensor in pair)
        out += layer(name, "Convolution" if name.startswith("conv") else "InnerProduct", body)
        out += layer(f"relu{name[-1]}", "ReLU") if name != "fc8" else b""
        if name in ("conv1", "conv2"):
            norm = layer(f"norm{name[-1]}", "LRN")
            pool = layer(f"pool{name[-1]}", "Pooling")
            out += pool + norm if pool_first else norm + pool
        if name == "conv5":
            out += layer("pool5", "Pooling")
    return out


def jiecaoyus(blobs: Blobs) -> dict[str, object]:
    """The contents of alexnet.pth.tar, as their main.py saves a network trained with DataParallel."""
    places = ["features.module.0", "features.module.4", "features.module.8", "features.module.10"]
    places += ["features.module.12", "classifier.0", "classifier.3", "classifier.6"]
    tensors: dict[str, Tensor] = {}
    for place, (weight, bias) in zip(places, blobs.values(), strict=True):
        tensors |= {f"{place}.weight": weight, f"{place}.bias": bias}
    return {"epoch": 90, "arch": "alexnet", "state_dict": tensors, "best_prec1": 57.5}


def assert_same(network: AlexNet, blobs: Blobs, pool_first: bool) -> None:
    images = 256 * torch.rand(2, 3, 227, 227, generator=torch.Generator().manual_seed(1)) - 115
    with torch.no_grad():
        found, expected = network.eval()(images), caffes_forward(blobs, images, pool_first)
        other = caffes_forward(blobs, images, not pool_first)
        mirrored = caffes_forward(blobs, images.flip(1), pool_first)
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * scale)
    # And the comparison tells the wrong order of layers and of channels from the right one.
    assert float((found - other).abs().max()) > 1e-2 * scale
    assert float((found - mirrored).abs().max()) > 1e-2 * scale


def imported_network(folder: Path) -> AlexNet:
    network = make_network(checkpoint.read_state(folder).identity)
    checkpoint.load_network(folder, network)
    return network


@pytest.mark.parametrize(("pool_first", "old"), [(False, True), (True, False)])
def test_caffes_weights_compute_what_caffe_computes(
    blobs: Blobs, shard_set: Path, tmp_path: Path, pool_first: bool, old: bool
) -> None:
    source = tmp_path / "weights.caffemodel"
    source.write_bytes(caffemodel(blobs, pool_first, old))
    import_weights.main(ImportConfig(source, shard_set, tmp_path / "imported"))
    state = checkpoint.read_state(tmp_path / "imported")
    assert state.origin.startswith("bvlc_reference_caffenet" if pool_first else "bvlc_alexnet")
    np.testing.assert_allclose(np.array(state.identity.rgb.mean) * 255, CAFFE_MEAN)
    assert_same(imported_network(tmp_path / "imported"), blobs, pool_first)


@pytest.mark.parametrize("zipped", [False, True])
def test_jiecaoyus_weights_and_their_evaluation(
    blobs: Blobs, shard_set: Path, tmp_path: Path, zipped: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "alexnet.pth.tar"
    torch.save(jiecaoyus(blobs), source, _use_new_zipfile_serialization=zipped)
    import_weights.main(ImportConfig(source, shard_set, tmp_path / "imported"))
    assert_same(imported_network(tmp_path / "imported"), blobs, False)
    if zipped:
        result = tmp_path / "result.json"
        evaluate.main(EvaluateConfig(str(shard_set), str(tmp_path / "imported"), json=result, gpu=False))
        assert "is AlexNet of jiecaoyu/pytorch_imagenet, imported from alexnet.pth.tar" in capsys.readouterr().out
        assert json.loads(result.read_text())["images"] == 15


def test_what_does_not_fit_is_refused(blobs: Blobs, shard_set: Path, tmp_path: Path) -> None:
    def refuse(name: str, data: bytes, why: str) -> None:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InterchangeError, match=why):
            import_weights.main(ImportConfig(tmp_path / name, shard_set, tmp_path / "imported"))

    small = {name: (weight[:2], bias[:2]) for name, (weight, bias) in blobs.items()}
    refuse("a.caffemodel", caffemodel(small, False, False), r"conv1\.weight is \[2, 3, 11, 11\], a two-tower")
    refuse("c.caffemodel", b"\xff" * 40, "is no .caffemodel")
    refuse("d.caffemodel", b"", "is no .caffemodel")
    refuse("e.pth.tar", b"\x80\x02nonsense", "torch.save")
    refuse("f.npy", b"", "of no known kind")
    torch.save({"state_dict": {"features.0.weight": torch.zeros(1)}}, tmp_path / "g.pth.tar")
    refuse("g.pth.tar", (tmp_path / "g.pth.tar").read_bytes(), "not jiecaoyu's AlexNet")
    torch.save([torch.zeros(1)], tmp_path / "h.pth")
    refuse("h.pth", (tmp_path / "h.pth").read_bytes(), "it holds a list, and no mapping of names to tensors")
    nine = {**blobs, "fc8": (torch.zeros(9, 4096), torch.zeros(9))}
    refuse("h.caffemodel", caffemodel(nine, False, False), "tell 9 classes apart, the set .* has 3")
    assert not (tmp_path / "imported").exists()


def test_exports_compute_the_same(blobs: Blobs, shard_set: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    source = tmp_path / "weights.caffemodel"
    source.write_bytes(caffemodel(blobs, False, False))
    folder = tmp_path / "imported"
    import_weights.main(ImportConfig(source, shard_set, folder))
    for name in ("network.onnx", "network.safetensors"):
        export.main(ExportConfig(str(folder), tmp_path / name))
    images = 256 * torch.rand(3, 3, 227, 227, generator=torch.Generator().manual_seed(2)) - 115
    expected = caffes_forward(blobs, images, False).numpy()
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"images": images.numpy()})
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == ["n0", "n1", "n2"]
    with safe_open(tmp_path / "network.safetensors", "pt") as file:
        assert file.metadata()["origin"] == about["origin"]
        assert torch.equal(file.get_tensor("conv1.weight"), blobs["conv1"][0].flip(1))


def test_a_model_that_computes_something_else_is_noticed() -> None:
    pytest.importorskip("onnxruntime")
    network = AlexNet(CLASSES).eval()
    network.initialize(0, 0.1, "he")
    program = export.to_onnx(network, {})
    assert export.parity(program, network) < export.PARITY
    with torch.no_grad():
        network.fc8.weight[0] *= 1.01
    assert export.parity(program, network) > export.PARITY
