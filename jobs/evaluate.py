"""Top-1 and top-5 validation error of a checkpoint, by the center crop or the paper's ten crops, each image once.

python jobs/evaluate.py --data SHARDS --checkpoint RUNS/first --ten-crop
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from jobs.cli.command import GpuChoice, run
from jobs.cli.cores import cores
from jobs.cluster.paths import whole_path


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    data: Path
    """The shard set whose validation images are judged, on a disk."""
    checkpoint: str
    """A checkpoint_* folder, or a run's folder (its best checkpoint); a local path or a URL (s3://, gs://)."""
    ten_crop: bool = False
    """Average the softmax over the four corners, the center and their mirror images (the paper, section 4.1)."""
    json: Path | None = None
    """Also write the result to this file."""
    gpu: GpuChoice = None
    """Use a GPU; None: if torch sees one."""
    batch_size: int = 100
    """Images at a time; with --ten-crop each is seen ten times."""
    threads: int = cores()
    """Decoder threads."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.threads < 1:
            raise ValueError(f"--batch-size is {self.batch_size} and --threads {self.threads}; both must be at least 1")

    def with_whole_paths(self) -> EvaluateConfig:
        """The same with absolute paths, ~ expanded.

        Raises:
            ValueError: for a relative path in the working directory of a submitted job, or a result without a folder.
        """
        json = self.json and Path(whole_path("--json", str(self.json)))
        if json and not json.parent.is_dir():
            raise ValueError(f"--json {json} cannot be written: there is no folder {json.parent}")
        return dataclasses.replace(
            self,
            data=Path(whole_path("--data", str(self.data))),
            checkpoint=whole_path("--checkpoint", self.checkpoint),
            json=json,
        )


if __name__ == "__main__":
    run(EvaluateConfig, "jobs.evaluate")  # Before the imports below, which take seconds.

import numpy as np
import torch

from jobs.cli.device import choose_device
from jobs.cli.progress import counted
from jobs.training import checkpoint
from jobs.training.run_storage import local_checkpoint
from jobs.training.worker import make_network
from model.metrics import Score, evaluate
from pipeline.dataset.info import read_dataset, write_json
from pipeline.dataset.split_reader import SplitReader
from pipeline.loading.loader import Loader
from pipeline.loading.plan import TEN_CROPS, center_crops
from pipeline.storage.locations import shown


def main(config: EvaluateConfig) -> None:
    config = config.with_whole_paths()
    info = read_dataset(config.data)
    device = choose_device(config.gpu)
    with local_checkpoint(config.checkpoint) as (location, folder):
        state = checkpoint.read_state(folder)
        identity = state.identity
        checkpoint.check_other_classes(identity, info, location, str(config.data))
        network = make_network(identity).to(memory_format=torch.channels_last).to(device)
        checkpoint.load_network(folder, network)

    reader = SplitReader(config.data, info, "val")
    crops = len(TEN_CROPS) if config.ten_crop else 1
    # The mean is the training run's, not this set's: it is part of what was learned.
    loader = Loader(reader, identity.rgb, config.batch_size, device, config.threads, ten_crop=config.ten_crop)
    batches = loader.run(center_crops(np.arange(len(reader))).chunks(config.batch_size))
    started = time.perf_counter()
    score = Score.of(evaluate(network, counted(batches, len(reader)), device, crops))
    kind = "ten crops" if config.ten_crop else "center crop"
    if state.origin:
        print(f"{shown(location)} is {state.origin}")
    print(f"{shown(location)}, {kind}, {score.images} images in {time.perf_counter() - started:.0f} s")
    print(f"top-1 error {score.top1_error:.2%}, top-5 error {score.top5_error:.2%}, loss {score.loss:.4f}")
    if config.json is not None:
        result = {**dataclasses.asdict(score), "crops": crops, "checkpoint": shown(location), "data": str(config.data)}
        if state.origin:
            result["origin"] = state.origin
        write_json(config.json, result)
