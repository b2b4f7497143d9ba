"""A run of two workers that meets a corrupt image in the middle of an epoch, as a user sees it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.evaluate import EvaluateConfig
from jobs.evaluate import main as evaluate
from jobs.training import checkpoint
from jobs.training.run_state import RunFingerprint, State
from jobs.training.worker import make_network
from model.progress import Progress
from model.recipe import RECIPES, Recipe
from model.schedule import Plateau
from pipeline.dataset.info import DatasetError, read_dataset
from pipeline.loading.plan import Plan, color_matrix
from tests.damage import Place, flip_in_the_middle, own_copy, places
from tests.processes import outside_clusters
from tests.runs import ROOT

BATCH = 4
AT = 22  # In the first epoch's order: the last rank's first image of the sixth of eleven steps.
PROMPT_S = 300  # Of a busy machine; a worker that waits for another would wait 30 minutes.


@pytest.fixture(scope="module")
def damaged(shard_set: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Place]:
    """A set and its corrupt image."""
    root = own_copy(shard_set, tmp_path_factory.mktemp("damaged") / "shards")
    plan = Plan(45, BATCH, RECIPES["default"].seed, color_matrix(read_dataset(root).rgb))
    bad = places(root, "train")[plan.order(0)[AT]]
    flip_in_the_middle(bad)
    return root, bad


def train(root: Path, storage: Path, *flags: str) -> tuple[int, list[tuple[float, str]], str]:
    """Trains one epoch: exit status, each line of stdout with the seconds from it to the end, and stderr."""
    arguments = ["--data", root, "--storage", storage, "--name", "a", "--workers", "2", "--no-gpus", "--epochs", "1"]
    arguments += ["--batch-size", BATCH, "--cpus-per-worker", "1", "--log-every", "1", *flags]
    errors = storage.with_suffix(".stderr")
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "jobs/train.py", *map(str, arguments)],
            cwd=ROOT,
            env=outside_clusters(),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        assert process.stdout is not None
        lines = [(time.monotonic(), line.rstrip("\n")) for line in process.stdout]
        status = process.wait(60)
        ended = time.monotonic()
        process.stdout.close()
    return status, [(ended - moment, line) for moment, line in lines], errors.read_text()


@pytest.mark.slow
def test_a_corrupt_image_ends_the_run_with_one_line(damaged: tuple[Path, Place], tmp_path: Path) -> None:
    root, bad = damaged
    status, lines, errors = train(root, tmp_path / "runs")
    assert status == 1, errors
    # A traceback of ours, of whichever process, would end in a second line that names the image. Ray's own actors may
    # complain of a busy machine: "(Actor pid=1) ...".
    (line,) = [line for line in errors.splitlines() if f"{bad.key} of " in line]
    own = [line for line in errors.splitlines() if not re.match(r"(\x1b\[\d+m)*\(\w+ pid=", line)]
    assert line == own[-1]
    assert not any("Traceback" in line for line in own)
    assert line.startswith(f"error: train image {bad.key} of {bad.shard}: it is not what was written: ")
    assert line.endswith(
        f"rm {root}/train/{bad.shard}.* && python jobs/shard_imagenet.py --source IMAGES --output {root}"
    )
    steps = [text.split(":")[0] for _, text in lines if ": loss " in text]
    # No step of the batch with the corrupt image, and no second attempt, which would begin with step 1 again.
    assert len(steps) == len(set(steps)) <= AT // BATCH
    assert not any("continuing after" in text for _, text in lines)
    # The workers met before the fault, so this is at least the time from the fault to the end.
    (met,) = [before for before, text in lines if "workers: " in text]
    assert met < PROMPT_S


def test_evaluation_names_a_corrupt_image(shard_set: Path, tmp_path: Path) -> None:
    root = own_copy(shard_set, tmp_path / "shards")
    saved = tmp_path / "checkpoint"
    saved.mkdir()
    info = read_dataset(root)
    identity = RunFingerprint.of(Recipe(), info)
    checkpoint.save_network(saved, make_network(identity), State(identity, Progress(Plateau(0.01))))
    place = places(root, "val")[7]
    flip_in_the_middle(place)
    with pytest.raises(DatasetError, match=f"val image {place.key} of {place.shard}: it is not what was written"):
        evaluate(EvaluateConfig(str(root), str(saved), gpu=False))
