"""Evaluation where the data are: at a URL, in a copy that training has staged, over several workers."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

from jobs.cli.workers import Workers
from jobs.evaluate import EvaluateConfig, judge
from jobs.evaluate import main as evaluate
from jobs.train import evaluation
from jobs.training import checkpoint
from jobs.training.config import TrainConfig
from jobs.training.run_state import RunFingerprint, State
from jobs.training.worker import make_network
from model.alexnet import AlexNet
from model.progress import Progress
from model.recipe import Recipe
from model.schedule import Plateau
from pipeline.dataset.info import DatasetError, read_dataset
from pipeline.staging.decoded_cache import stage_pixels
from pipeline.staging.staging import stage
from tests.damage import flip_in_the_middle, places
from tests.processes import JOBS, run_here
from tests.shard_sets import s3_options

BATCH = 4  # Of 15 images: four batches, the last one shorter.


@pytest.fixture(scope="module")
def saved(shard_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of initial weights, for which each image has a loss of its own."""
    folder = tmp_path_factory.mktemp("saved")
    identity = RunFingerprint.of(Recipe(), read_dataset(shard_set))
    checkpoint.save_network(folder, make_network(identity), State(identity, Progress(Plateau(0.01))))
    return folder


@pytest.fixture(scope="module")
def here(shard_set: Path, saved: Path) -> dict[str, Any]:
    """What this process finds in the set where it is."""
    return evaluated(shard_set, saved)[0]


def evaluated(data: object, saved: Path, *more: object) -> tuple[dict[str, Any], str]:
    """What an evaluation in this process found, but for where the set is; and what it printed."""
    output = saved / "result.json"
    done = run_here("evaluate", "--data", data, "--checkpoint", saved, "--no-gpus", "--json", output, *more)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    del found["data"]
    return found, done.stdout


@pytest.mark.slow
def test_a_set_at_a_url_is_judged_by_a_copy_of_its_validation_images(
    shard_set: Path, saved: Path, here: dict[str, Any], s3: str, client: Any, tmp_path: Path
) -> None:
    for path in shard_set.rglob("*.*"):
        client.upload_file(str(path), "bucket", f"shards/{path.relative_to(shard_set)}")
    found, printed = evaluated(f"s3://bucket/shards{s3_options(s3)}", saved, "--stage", tmp_path)
    assert found == here
    assert found["images"] == 15
    assert "in 2 of 2 shards from s3://bucket/shards" in printed
    assert {path.name for path in tmp_path.rglob("*.tar")} == {"val-000000.tar", "val-000001.tar"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jpeg", "pixels"])
def test_what_training_has_staged_is_not_copied_again(
    shard_set: Path, saved: Path, here: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    if kind == "jpeg":
        stage(str(shard_set), tmp_path, print)
    else:
        stage_pixels(str(shard_set), tmp_path, print, 1)
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*")}
    found, printed = evaluated(shard_set, saved, "--stage", tmp_path, "--stage-as", kind)
    assert {path: path.stat().st_ino for path in tmp_path.rglob("*")} == before
    assert not any(word in printed for word in ("staging", "decoding"))
    assert found == here


def test_a_url_without_a_stage_is_refused_with_what_to_add() -> None:
    with pytest.raises(ValueError, match="--data is a URL: add --stage FOLDER"):
        evaluate(EvaluateConfig("s3://KEY:SECRET@bucket/set?region=x", "run", ten_crop=True))


def test_a_corrupt_image_is_named(root: Path, saved: Path) -> None:
    place = places(root, "val")[7]
    flip_in_the_middle(place)
    with pytest.raises(DatasetError, match=f"val image {place.key} of {place.shard}: it is not what was written"):
        evaluate(EvaluateConfig(str(root), str(saved), gpu=False))


def test_a_worker_more_than_there_are_batches_has_nothing_to_add(shard_set: Path, saved: Path) -> None:
    identity = checkpoint.read_state(saved).identity
    config = EvaluateConfig(str(shard_set), str(saved), batch_size=BATCH)
    assert judge(config, identity.rgb, make_network(identity), False, 1, rank=0, world=5).tolist() == [0, 0, 0, 0]


def test_a_gpu_is_to_give_the_same_bits_each_time(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in training. No GPU is needed to look at how torch is set up for one."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr("jobs.evaluate.choose_device", lambda gpus: torch.device("cuda"))
    with torch.device("meta"):
        network = AlexNet(3)
    with pytest.raises(DatasetError, match="does not exist"):
        judge(EvaluateConfig("/nowhere", str(saved)), checkpoint.read_state(saved).identity.rgb, network, True, 1)
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.allow_tf32


def test_a_submitted_training_ends_with_a_command_to_submit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "working_dir_files" / "_ray_pkg_0123456789abcdef"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    url, run = "bucket/my set?region=a&scheme=http", "s3://bucket/runs/first"
    config = TrainConfig(f"s3://KEY:SECRET@{url}", "s3://bucket/runs", "first", workers=Workers(2, 4), gpus=True)
    config = dataclasses.replace(config, stage="/mnt/nvme", stage_as="pixels")
    words = shlex.split(evaluation(config, run))
    assert words[:8] == ["ray", "job", "submit", "--working-dir", ".", "--", "python", "jobs/evaluate.py"]
    given = tyro.cli(EvaluateConfig, args=words[8:], config=(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone))
    assert given == EvaluateConfig(
        f"s3://{url}", run, "/mnt/nvme", stage_as="pixels", ten_crop=True, workers=4, gpu=True
    )


@pytest.mark.slow
def test_the_command_that_training_ends_with_needs_no_environment_and_two_workers_find_what_one_process_does(
    saved: Path, shard_set: Path, tmp_path: Path
) -> None:
    config = TrainConfig(str(shard_set), str(saved.parent), saved.name, stage=str(tmp_path / "my disk"))
    output = tmp_path / "two.json"
    done = subprocess.run(
        f"{evaluation(config, str(saved))} --workers 2 --no-gpus --batch-size {BATCH} --json {output}",
        shell=True,
        cwd=tmp_path,
        # As where the project is installed.
        env={"PATH": os.defpath, "PYTHONPATH": str(JOBS.parent)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "ten crops, 15 images" in done.stdout
    found = json.loads(output.read_text())
    one, _ = evaluated(shard_set, saved, "--batch-size", BATCH, "--ten-crop")
    assert found.pop("data") == str(shard_set)
    # The losses are added in another order, and computed with other threads.
    assert found.pop("loss") == pytest.approx(one.pop("loss"), rel=1e-6)
    assert found == one
