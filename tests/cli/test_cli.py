"""What every command's line shares: --help and a mistake are answered at once, each in one line with what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from shlex import quote

import pytest

from jobs.cli.command import one_line
from tests.processes import JOBS, run_here

COMMANDS = sorted(path.stem for path in JOBS.glob("*.py") if path.stem != "__init__")
HEAVY = {"torch", "ray", "nvidia.dali"}


@pytest.mark.parametrize(("job", "argument"), [("train", "--no-such-flag"), *((job, "--help") for job in COMMANDS)])
def test_help_and_a_typo_import_nothing_that_takes_seconds(job: str, argument: str) -> None:
    command = [sys.executable, "-X", "importtime", str(JOBS / f"{job}.py"), argument]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "tyro" in imported
    assert not HEAVY & imported
    assert done.returncode == (0 if argument == "--help" else 2)
    assert ("show this help" if argument == "--help" else "no-such-flag") in done.stdout + done.stderr


def test_the_help_of_training_has_groups_and_each_recipes_values() -> None:
    shown = run_here("train", "--help").stdout
    groups = [f" {name} options " for name in ("data", "hardware", "recipe", "checkpoint", "fault", "logging")]
    places = [shown.index(group) for group in groups]
    assert places == sorted(places)
    assert "(default: 0.01; large-batch: 10.0; batchnorm: 0.05)" in " ".join(shown.replace("│", "").split())


@pytest.mark.parametrize(
    ("job", "arguments", "message"),
    [
        ("shard_imagenet", ["--source", "x", "--output", "https://h/set"], "--output https://h/set cannot be written"),
        ("look", ["--data", "gs://KEY:SECRET@bucket/set"], "--data is a URL: it takes a path"),
        ("train", ["--resume"], "there is no --resume: give the same command again, which continues the run"),
        ("evaluate", ["--resume", "last.ckpt"], "there is no --resume: give --checkpoint"),
        ("train", ["--nproc_per_node=8"], "there is no --nproc_per_node: give --workers"),
        ("train", ["-b", "256"], "there is no -b: give --batch-size"),
        ("train", ["-j", "8"], "there is no -j: give --cpus-per-worker"),
        ("evaluate", ["-j", "8"], "there is no -j: give --threads"),
        ("train", ["--max_epochs", "9"], "there is no --max_epochs: give --epochs"),
        ("doctor", ["--gpu", "--no-gpus"], "--gpus and --no-gpus exclude each other"),
        ("train", ["--data", "x", "--storage", "y", "--name", "z", "--lr", "-1"], "lr is -1.0; it must be"),
        ("train", ["--data", "x", "--storage", "y", "--name", "z", "--keep", "0"], "--keep is 0; it must be"),
    ],
)
def test_wrong_usage_is_status_2_and_named(job: str, arguments: list[str], message: str, tmp_path: Path) -> None:
    done = run_here(job, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "SECRET" not in done.stderr


def test_a_source_a_run_and_a_set_are_told_apart(shard_set: Path, tmp_path: Path) -> None:
    def refused(job: str, *arguments: object) -> str:
        done = run_here(job, *arguments)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        return line

    images, run = tmp_path / "my images", tmp_path / "run"
    image = images / "train" / "cat" / "1.JPEG"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"")
    (tmp_path / "a.tar").write_bytes(b"")
    (run / "checkpoint_0001_000000").mkdir(parents=True)
    for source, made in ((images, f"{images}-shards"), (tmp_path / "a.tar", f"{tmp_path / 'a'}-shards")):
        line = refused("look", "--data", source)
        assert f"--data {source} is a source of images, and no shard set" in line
        assert f"--source {quote(str(source))} --output {quote(made)}`" in line
    assert f"--data {run} holds checkpoints" in refused("evaluate", "--data", run, "--checkpoint", run)
    assert "is a shard set: give a run's folder" in refused("evaluate", "--data", shard_set, "--checkpoint", shard_set)
    # A set that is being made holds tars too.
    (tmp_path / "begun" / "train").mkdir(parents=True)
    (tmp_path / "begun" / "train" / "train-000000.tar").write_bytes(b"")
    (tmp_path / "begun" / "unfinished.json").write_text("{}")
    assert "is unfinished" in refused("look", "--data", tmp_path / "begun")


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    done = run_here("look", "--data=~/none")
    assert done.stderr.startswith(f"error: the shard set {tmp_path}/none does not exist")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no s3://KEY:SECRET@bucket/set here", "no s3://bucket/set here"),
        ("at 'https://host/a.tar?sig=SECRET': gone", "at 'https://host/a.tar': gone"),
        ("--data is s3://bucket/set?key=SECRET: give another", "--data is s3://bucket/set: give another"),
        ("an@address and a? b", "an@address and a? b"),
        ("two\nlines", "two lines"),
    ],
)
def test_a_line_shows_no_key_of_a_url(text: str, shown: str) -> None:
    assert one_line(ValueError(text)) == shown
