"""Writes a checkpoint's network as one file: .safetensors, or .onnx (needs `pip install -e .[onnx]`).

Either file says what it holds: the input's mean, the classes, the recipe. An ONNX file is written only if ONNX Runtime
gives the same logits as this program.

    python jobs/export.py --checkpoint RUNS/first --output alexnet.onnx
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from jobs.cli.command import run

PARITY = 1e-4  # Of the largest logit: float32 sums of 9,216 products in another order differ by less.
IMAGES = 8  # Of the parity check.
SUFFIXES = (".safetensors", ".onnx")


class ExportError(ValueError):
    """The network cannot be written, or what was written does not compute the same."""


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    checkpoint: str
    """A checkpoint_* folder, or a run's folder (its best checkpoint); a local path or a URL."""
    output: Path
    """The file: NAME.safetensors or NAME.onnx."""

    def __post_init__(self) -> None:
        if self.output.suffix not in SUFFIXES:
            raise ValueError(f"--output is {self.output}; its name must end in {' or '.join(SUFFIXES)}")


if __name__ == "__main__":
    run(ExportConfig, "jobs.export")  # Before the imports below, which take seconds.

import torch
from safetensors.torch import save
from torch import nn
from torch.onnx import ONNXProgram

from jobs.training import checkpoint
from jobs.training.run_state import State
from jobs.training.run_storage import local_checkpoint
from jobs.training.worker import make_network
from model.alexnet import INPUT_SIZE
from pipeline.images.rgb_stats import MAX_LEVEL
from pipeline.storage.locations import shown
from pipeline.storage.remote import write_atomically


def metadata(state: State) -> dict[str, str]:
    """What a reader must know to use the network, as strings."""
    identity = state.identity
    return {
        "input": f"float32 [batch, 3, {INPUT_SIZE}, {INPUT_SIZE}]: RGB, gray levels 0 to 255 less the mean",
        "mean": json.dumps([MAX_LEVEL * level for level in identity.rgb.mean]),
        "classes": json.dumps(identity.wnids),
        "recipe": json.dumps(dataclasses.asdict(identity.recipe)),
        "origin": state.origin or f"trained on the shard set {identity.dataset}",
    }


def to_onnx(network: nn.Module, about: dict[str, str]) -> ONNXProgram:
    """A network in evaluation mode as an ONNX model with the input `images`, the output `logits` and any batch size.

    Raises:
        ExportError: if the packages for it are missing.
    """
    try:
        import onnxruntime  # noqa: F401  as onnxscript: torch needs it and would complain later
        import onnxscript  # noqa: F401
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
    program.model.metadata_props.update(about)
    return program


def parity(program: ONNXProgram, network: nn.Module) -> float:
    """The largest difference of ONNX Runtime's logits from torch's, as a fraction of the largest logit."""
    # Random pixels less a mean of 128.
    pixels = torch.rand(IMAGES, 3, INPUT_SIZE, INPUT_SIZE, generator=torch.Generator().manual_seed(0))
    images = 256 * pixels - 128
    with torch.no_grad():
        expected = network(images)
    (found,) = program(images)
    return float((found - expected).abs().max() / expected.abs().max())


def main(config: ExportConfig) -> None:
    with local_checkpoint(config.checkpoint) as (location, folder):
        state = checkpoint.read_state(folder)
        network = make_network(state.identity).eval()
        checkpoint.load_network(folder, network)
    about = metadata(state)
    if config.output.suffix == ".safetensors":
        tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
        write_atomically(config.output, save(tensors, about))
        print(f"{shown(location)} is in {config.output}")
        return
    program = to_onnx(network, about)
    difference = parity(program, network)
    if not difference <= PARITY:
        raise ExportError(
            f"ONNX Runtime's logits differ from torch's by {difference:.1e} of the largest, more than {PARITY:g}: "
            f"{config.output} was not written; try another version of onnxruntime"
        )
    write_atomically(config.output, program.model_proto.SerializeToString())
    print(
        f"{shown(location)} is in {config.output}; on {IMAGES} random images ONNX Runtime's logits differ from torch's "
        f"by at most {difference:.1e} of the largest"
    )
