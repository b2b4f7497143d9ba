"""One worker, two, and one that is killed twice and started again: the loss of each step, and the weights at the end.

    python -m tests.benchmarks.exactness --data SHARDS --work FOLDER --json docs/benchmarks/exactness.json

Each run is jobs/train.py with the default recipe in float32 on the CPU. The third is killed by SIGKILL, with all its
processes, within two different epochs; the same command continues it from a checkpoint. With dropout, two workers draw
other masks than one, so their losses differ by more than rounding; --dropout 0 compares the rest. A finished run stays
in --work, as is what an unfinished one has done. tests/benchmarks/figures.py says what the JSON holds and draws it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from jobs.cli.command import run
from jobs.training.trackers import EVENTS, MAX_POINTS, read_events
from model.recipe import RECIPES
from pipeline.dataset.info import read_dataset, write_json
from tests.benchmarks.contest import check_least
from tests.processes import below, outside_clusters

ROOT = Path(__file__).resolve().parents[2]
KILLS = (0.3, 0.75)
"""After which fractions of all steps."""
RUNS: dict[str, tuple[int, tuple[float, ...]]] = {
    "one worker": (1, ()),
    "two workers": (2, ()),
    "one worker, killed twice": (1, KILLS),
}
"""By name: workers, and when the run is killed. The first is what the others are compared with."""


@dataclasses.dataclass(frozen=True)
class ExactnessConfig:
    data: Path
    """A shard set."""
    work: Path
    """Where the runs are kept; the same command continues from there."""
    json: Path | None = None
    """Also write the losses to this file."""
    epochs: int = 3
    """Of each run."""
    batch_size: int = RECIPES["default"].batch_size
    """Images per step over all workers."""
    dropout: float = RECIPES["default"].dropout
    """With 0, two workers differ from one by rounding alone."""

    def __post_init__(self) -> None:
        check_least(self, "epochs", "batch_size")

    def settings(self) -> dict[str, Any]:
        """What runs must have in common to be compared."""
        return {"data": str(self.data.resolve()), **{n: getattr(self, n) for n in ("epochs", "batch_size", "dropout")}}


def train(config: ExactnessConfig, name: str, steps: int, kill_after: int | None = None) -> None:
    """Starts a run or continues it, to its end or until it has printed a step.

    Args:
        steps: of an epoch.
        kill_after: steps from the run's start.

    Raises:
        ValueError: if it fails, or ends before it is killed.
    """
    options = ["--data", config.data, "--storage", config.work, "--name", name, "--workers", RUNS[name][0], "--no-gpus"]
    options += ["--epochs", config.epochs, "--batch-size", config.batch_size, "--dropout", config.dropout]
    options += ["--log-every", 1, "--checkpoint-every", max(1, steps // 4)]
    with subprocess.Popen(
        [sys.executable, "jobs/train.py", *map(str, options)],
        cwd=ROOT,
        env={**outside_clusters(), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        last = ""
        try:
            for last in process.stdout:
                print(f"{name}: {last}", end="", flush=True)
                if kill_after is not None:
                    epoch, step = divmod(kill_after - 1, steps)
                    if f"epoch {epoch + 1}/{config.epochs} step {step + 1}/{steps}:" in last:
                        break
            status = process.wait() if kill_after is None else process.poll()
        finally:
            # Ray and its workers, too: left alone, they would end in good order.
            for pid in (process.pid, *below(process.pid)) if process.poll() is None else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    if status != (0 if kill_after is None else None):
        raise ValueError(f"{name} ended with exit status {status}: {last.strip()}")


def measure(config: ExactnessConfig, name: str) -> dict[str, Any]:
    """A run's row of the JSON, from --work if the run is finished.

    Raises:
        ValueError: if --work holds runs of other settings, or a run fails.
    """
    kept = config.work / f"{name}.json"
    found: dict[str, Any] = {"settings": config.settings(), "killed_after": []}
    if kept.exists():
        found = json.loads(kept.read_text("utf-8"))
    if found["settings"] != config.settings():
        raise ValueError(f"{kept} is of other settings, {found['settings']}: give another --work")
    if "row" not in found:
        steps = read_dataset(config.data).splits["train"].samples // config.batch_size
        if steps * config.epochs > MAX_POINTS:
            raise ValueError(
                f"{steps * config.epochs} steps are more than the {MAX_POINTS} that are kept: fewer --epochs"
            )
        for fraction in RUNS[name][1][len(found["killed_after"]) :]:
            kill_after = round(fraction * steps * config.epochs)
            train(config, name, steps, kill_after)
            found["killed_after"].append(kill_after)
            write_json(kept, found)
        train(config, name, steps)
        run = config.work / name
        points = read_events(str(run / EVENTS)).scalars["train/loss"]
        with open(run / f"checkpoint_{config.epochs:04d}_000000" / "model.safetensors", "rb") as weights:
            digest = hashlib.file_digest(weights, "sha256").hexdigest()
        found["row"] = {
            "run": name,
            "step": [step for step, _ in points],
            "train_loss": [loss for _, loss in points],
            "killed_after": found["killed_after"],
            "weights_sha256": digest,
        }
        write_json(kept, found)
    row: dict[str, Any] = found["row"]
    return row


def main(config: ExactnessConfig) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # So that the run under way ends, too.
    config.work.mkdir(parents=True, exist_ok=True)
    rows = [measure(config, name) for name in RUNS]
    first = dict(zip(rows[0]["step"], rows[0]["train_loss"], strict=True))
    for row in rows:
        apart = max(abs(loss - first[step]) for step, loss in zip(row["step"], row["train_loss"], strict=True))
        print(f"{row['run']}: loss at most {apart:.2g} from the first; weights {row['weights_sha256']}")
    if config.json is not None:
        config.json.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", "utf-8")


if __name__ == "__main__":
    run(ExactnessConfig, main)
