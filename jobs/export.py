"""Writes a checkpoint's network as one file: .safetensors, or .onnx (needs `pip install -e .[onnx]`).

Either file says what it holds: the input's mean, the classes, the recipe. An ONNX file is written only if ONNX Runtime
gives the same logits as this program.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from jobs import checkpoint
from jobs.checkpoint import State
from jobs.cli import run
from jobs.evaluate import local_checkpoint
from jobs.worker import make_network
from model.alexnet import INPUT_SIZE
from pipeline.dataset import write_atomically
from pipeline.rgb_stats import MAX_LEVEL

PARITY = 1e-4  # Of the largest logit: float32 sums of 9,216 products in another order differ by less.
SUFFIXES = (".safetensors", ".onnx")


class ExportError(ValueError):
    """The network cannot be written, or what was written does not compute the same."""


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    checkpoint: str
    """A checkpoint_* folder, or a run's folder (its best checkpoint); a local path or a URL."""
    output: Path
    """The file: NAME.safetensors or NAME.onnx."""
    images: int = 8
    """How many random images the parity check compares."""
    seed: int = 0
    """Of these images."""

    def __post_init__(self) -> None:
        if self.output.suffix not in SUFFIXES:
            raise ValueError(f"--output is {self.output}; its name must end in {' or '.join(SUFFIXES)}")
        if self.images < 1:
            raise ValueError(f"--images is {self.images}; it must be at least 1")


def metadata(state: State) -> dict[str, str]:
    """What a reader must know to use the network, as strings."""
    identity = state.identity
    return {
        "input": f"float32 [batch, 3, {INPUT_SIZE}, {INPUT_SIZE}]: RGB, grey levels 0 to 255 less the mean",
        "mean": json.dumps([MAX_LEVEL * level for level in identity.rgb.mean]),
        "classes": json.dumps(identity.wnids),
        "recipe": json.dumps(dataclasses.asdict(identity.recipe)),
        "origin": state.origin or f"trained on the shard set {identity.dataset}",
    }


def random_images(count: int, seed: int) -> Tensor:
    """Random pixels of a photograph's range, float32 [count, 3, 227, 227], less a mean of 128."""
    generator = torch.Generator().manual_seed(seed)
    return 256 * torch.rand(count, 3, INPUT_SIZE, INPUT_SIZE, generator=generator) - 128


def to_onnx(network: nn.Module, about: dict[str, str]) -> bytes:
    """A network in evaluation mode as an ONNX model with the input `images`, the output `logits` and any batch size.

    Raises:
        ExportError: if the packages for it are missing.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  torch.onnx needs it and would complain later
    except ImportError as error:
        raise ExportError(f"{error}: install the packages for ONNX with: pip install -e '.[onnx]'") from error
    program = torch.onnx.export(
        network,
        (torch.zeros(2, 3, INPUT_SIZE, INPUT_SIZE),),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    assert program is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        program.save(path)
        model = onnx.load(path)
    onnx.helper.set_model_props(model, about)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def parity(model: bytes, network: nn.Module, images: Tensor) -> float:
    """The largest difference of ONNX Runtime's logits from torch's, as a fraction of the largest logit.

    Raises:
        ExportError: if ONNX Runtime is missing.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError(f"{error}: install the packages for ONNX with: pip install -e '.[onnx]'") from error
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"images": images.numpy()})
    with torch.no_grad():
        expected = network(images).numpy()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def main(config: ExportConfig) -> None:
    with local_checkpoint(config.checkpoint) as (location, folder):
        state = checkpoint.read_state(folder)
        network = make_network(state.identity).eval()
        checkpoint.load_network(folder, network)
    about = metadata(state)
    if config.output.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, config.output, about)
        print(f"{location} is in {config.output}")
        return
    model = to_onnx(network, about)
    difference = parity(model, network, random_images(config.images, config.seed))
    if not difference <= PARITY:
        raise ExportError(
            f"ONNX Runtime's logits differ from torch's by {difference:.1e} of the largest, more than {PARITY:g}: "
            f"{config.output} was not written; try another version of onnxruntime"
        )
    write_atomically(config.output, model)
    print(
        f"{location} is in {config.output}; on {config.images} random images ONNX Runtime's logits differ from torch's "
        f"by at most {difference:.1e} of the largest"
    )


if __name__ == "__main__":
    run(ExportConfig, main)
