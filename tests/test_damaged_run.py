"""A run of two workers that meets a corrupt image in the middle of an epoch, as a user sees it."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from jobs import checkpoint
from jobs.evaluate import EvaluateConfig
from jobs.evaluate import main as evaluate
from jobs.skipped import read_skips
from model.recipe import RECIPES
from pipeline.dataset import DatasetError, read_dataset
from pipeline.plan import Plan, colour_matrix
from tests.damage import Place, flip_in_the_middle, own_copy, places
from tests.test_train_job import ROOT, command, environment

BATCH = 4
AT = 22  # In the first epoch's order: the last rank's first image of the sixth of eleven steps.
PROMPT_S = 60  # Seconds, of which Ray's shutdown has most; a worker that waits for another would wait 30 minutes.


@pytest.fixture(scope="module")
def damaged(shard_set: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Place, Place]:
    """A set, its corrupt image and the one that follows it in the first epoch."""
    root = own_copy(shard_set, tmp_path_factory.mktemp("damaged") / "shards")
    plan = Plan(45, BATCH, RECIPES["default"].seed, colour_matrix(read_dataset(root).rgb))
    bad, following = (places(root, "train")[sample] for sample in plan.order(0)[AT : AT + 2])
    flip_in_the_middle(bad)
    return root, bad, following


def train(root: Path, storage: Path, *flags: str) -> tuple[int, list[tuple[float, str]], str]:
    """Trains one epoch: exit status, each line of stdout with the seconds from it to the end, and stderr."""
    arguments = ["--data", root, "--storage", storage, "--name", "a", "--workers", "2", "--no-gpus", "--epochs", "1"]
    arguments += ["--batch-size", BATCH, "--cpus-per-worker", "1", "--log-every", "1", *flags]
    errors = storage.with_suffix(".stderr")
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            command("train", *arguments), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=stderr, text=True
        )
        assert process.stdout is not None
        lines = [(time.monotonic(), line.rstrip("\n")) for line in process.stdout]
        status = process.wait(60)
        ended = time.monotonic()
        process.stdout.close()
    return status, [(ended - moment, line) for moment, line in lines], errors.read_text()


@pytest.mark.slow
def test_a_corrupt_image_ends_the_run_with_one_line(damaged: tuple[Path, Place, Place], tmp_path: Path) -> None:
    root, bad, _ = damaged
    status, lines, errors = train(root, tmp_path / "runs")
    assert status == 1, errors
    # A traceback of ours, of whichever process, would end in a second line that names the image. Ray's own actors may
    # complain of a busy machine: "(Actor pid=1) ...".
    (line,) = [line for line in errors.splitlines() if f"{bad.key} of " in line]
    own = [line for line in errors.splitlines() if not re.match(r"(\x1b\[\d+m)*\(\w+ pid=", line)]
    assert line == own[-1]
    assert not any("Traceback" in line for line in own)
    assert line.startswith(f"error: train image {bad.key} of {bad.shard}: it is not what was written: ")
    assert line.endswith(f"python jobs/shard_imagenet.py --source IMAGES --output {root} --only {bad.shard}")
    steps = [(before, text) for before, text in lines if ": loss " in text]
    # No step of the batch with the corrupt image, and no second attempt, which would begin with step 1 again.
    assert len(steps) == len({text.split(":")[0] for _, text in steps}) <= AT // BATCH
    assert not any("continuing after" in text for _, text in lines)
    # The last step was before the fault, so this is at least the time from the fault to the end.
    print(f"the run ended {steps[-1][0]:.1f} s after its last step")
    assert steps[-1][0] < PROMPT_S


@pytest.fixture(scope="module")
def finished(damaged: tuple[Path, Place, Place], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run with --skip-corrupt, and what it said."""
    storage = tmp_path_factory.mktemp("finished") / "runs"
    status, lines, errors = train(damaged[0], storage, "--skip-corrupt")
    assert status == 0, errors
    return storage / "a", [text for _, text in lines]


@pytest.mark.slow
def test_skip_corrupt_finishes_and_says_what_it_left_out(
    damaged: tuple[Path, Place, Place], finished: tuple[Path, list[str]]
) -> None:
    root, bad, following = damaged
    run, said = finished
    (skip,) = read_skips(str(run))
    assert (skip.epoch, skip.shard, skip.key, skip.substitute) == (1, bad.shard, bad.key, following.key)
    assert len([text for text in said if f"skipping a corrupt image, {skip}" in text]) == 1
    (final,) = [text for text in said if text.startswith("skipped 1 corrupt image(s), 1 time(s) in all, listed in ")]
    assert final.endswith(f"find the damage in {bad.shard} with: python jobs/verify_shards.py --data {root}")
    (progress,) = [state.progress for state in checkpoint.committed(str(run)).values()]
    assert progress.finished
    assert progress.history[0]["images"] == 44


@pytest.mark.slow
def test_evaluation_says_what_it_cannot_check_and_never_skips(
    shard_set: Path, finished: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = own_copy(shard_set, tmp_path / "shards")
    config = EvaluateConfig(root, str(finished[0]), gpu=False)
    place = places(root, "val")[7]
    flip_in_the_middle(place)
    with pytest.raises(DatasetError, match=f"val image {place.key} of {place.shard}: it is not what was written"):
        evaluate(config)
    assert "checksums" not in capsys.readouterr().out
    shutil.rmtree(root)
    own_copy(shard_set, root)
    for path in (root / "val").glob("*.json"):
        path.unlink()
    evaluate(config)
    said = capsys.readouterr().out
    assert said.count("2 val shard(s) have no checksums in their annotations: a damaged image there is found only") == 1
    assert "15 images" in said
