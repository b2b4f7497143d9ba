"""What every command's line shares: --help and a mistake are answered at once, each in one line with what to do; and
how many cores a command may use: what taskset, Slurm, docker --cpus and Kubernetes leave it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from shlex import quote

import pytest

from jobs.cli.command import one_line
from jobs.cli.cores import cores
from tests.processes import JOBS, refusal, run_here

COMMANDS = sorted(path.stem for path in JOBS.glob("*.py") if path.stem != "__init__")
HELP = """
import sys
from tests.processes import run_here
for job in sys.argv[1:]:
    done = run_here(job, "--help")
    assert done.returncode == 0 and "show this help" in done.stdout, done
    assert not {"torch", "ray", "nvidia.dali"} & sys.modules.keys(), job
assert run_here("train", "--no-such-flag").returncode == 2
assert not {"torch", "ray", "nvidia.dali"} & sys.modules.keys()
"""
MANY = 8  # Cores
SHARD = ["--source", "x", "--output", "y"]
TRAIN = ["--data", "x", "--storage", "y", "--name", "z"]
NOT_WRITABLE = "cannot be written: give a folder, s3://"


def test_help_and_a_typo_import_nothing_that_takes_seconds() -> None:
    subprocess.run([sys.executable, "-c", HELP, *COMMANDS], cwd=JOBS.parent, check=True)


def test_the_help_of_training_has_each_recipes_values() -> None:
    shown = run_here("train", "--help").stdout
    assert "(default: 0.01; large-batch: 10.0; batchnorm: 0.05)" in " ".join(shown.replace("│", "").split())


@pytest.mark.parametrize(
    ("job", "arguments", "message"),
    [
        ("shard_imagenet", [*SHARD, "--quality", "200"], "--quality 200 must lie between 1 and 95"),
        ("shard_imagenet", [*SHARD, "--workers", "0"], "--workers 0 must be at least 1"),
        ("shard_imagenet", [*SHARD, "--output", "https://h/x?key=SECRET"], f"--output https://h/x {NOT_WRITABLE}"),
        ("shard_imagenet", [*SHARD, "--output", "file://h/x"], f"--output file://h/x {NOT_WRITABLE}"),
        ("shard_imagenet", [*SHARD, "--output", "s3:/bucket/x"], f"--output s3:/bucket/x {NOT_WRITABLE}"),
        ("shard_imagenet", [*SHARD, "--output", ""], f"--output  {NOT_WRITABLE}"),
        ("look", ["--data", "gs://KEY:SECRET@bucket/set"], "--data is a URL: it takes a path"),
        ("look", ["--data", "x", "--seed", "-1"], "--seed is -1; it must lie in [0, 2^63)"),
        ("train", ["--resume"], "there is no --resume: give the same command again, which continues the run"),
        ("train", ["--nproc_per_node=8"], "there is no --nproc_per_node: give --workers"),
        ("evaluate", ["-j", "8"], "there is no -j: give --threads"),
        ("doctor", ["--gpu", "--no-gpus"], "--gpus and --no-gpus exclude each other"),
        ("train", [*TRAIN, "--lr", "-1"], "lr is -1.0; it must be"),
        ("train", [*TRAIN, "--keep", "0"], "--keep is 0; it must be"),
        ("train", [*TRAIN, "--checkpoint-minutes", "0"], "--checkpoint-minutes is 0.0; it must be above 0"),
        ("train", [*TRAIN, "--resize-seconds", "nan"], "--resize-seconds is nan; it must be above 0"),
        ("train", [*TRAIN, "--hang-seconds", "inf"], "--hang-seconds is inf; it must be above 0"),
        ("train", [*TRAIN, "--storage", "https://h/x?sig=SECRET"], f"--storage https://h/x {NOT_WRITABLE}"),
        ("train", [*TRAIN, "--storage", "s3:/bucket/x"], f"--storage s3:/bucket/x {NOT_WRITABLE}"),
        ("train", [*TRAIN, "--init-from", "a", "--from-checkpoint", "b"], "and --from-checkpoint exclude each other"),
        ("train", [*TRAIN, "--workers", "0:2"], "--workers is 0:2; it must be at least 1"),
        ("train", [*TRAIN, "--workers", "4:2"], "--workers is 4:2; the smaller number comes first, as 2:4"),
        ("train", [*TRAIN, "--workers", "-1"], "--workers is '-1'; it must be a number, or two as 2:4"),
    ],
)
def test_wrong_usage_is_status_2_and_named(job: str, arguments: list[str], message: str) -> None:
    done = run_here(job, *arguments)
    assert done.returncode == 2
    # In a box of as many lines as it takes.
    assert " ".join(message.split()) in " ".join(done.stderr.replace("│", "").split())
    assert "SECRET" not in done.stderr


def test_a_benchmark_refuses_what_it_cannot_measure(tmp_path: Path) -> None:
    for name, arguments, message in (
        ("plan_cost", ("--rounds", 0), "--rounds is 0; it must be at least 1"),
        ("source_memory", ("--images", 7), "--images is 7; it must be at least 2,000"),
        ("shard_fidelity", ("--source", tmp_path), f"{tmp_path} holds no photographs: give a folder"),
    ):
        done = run_here(str(JOBS.parent / "tests" / "benchmarks" / f"{name}.py"), *arguments)
        assert message in done.stderr


def test_a_source_a_run_and_a_set_are_told_apart(shard_set: Path, tmp_path: Path) -> None:
    images, run = tmp_path / "my images", tmp_path / "run"
    image = images / "train" / "cat" / "1.JPEG"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"")
    (tmp_path / "a.tar").write_bytes(b"")
    (run / "checkpoint_0001_000000").mkdir(parents=True)
    for source, made in ((images, f"{images}-shards"), (tmp_path / "a.tar", f"{tmp_path / 'a'}-shards")):
        line = refusal("look", "--data", source)
        assert f"--data {source} is a source of images, and no shard set" in line
        assert f"--source {quote(str(source))} --output {quote(made)}`" in line
    assert f"--data {run} holds checkpoints" in refusal("evaluate", "--data", run, "--checkpoint", run)
    assert "is a shard set: give a run's folder" in refusal("evaluate", "--data", shard_set, "--checkpoint", shard_set)
    for job in ("train", "evaluate", "doctor"):
        given = {"train": ["--storage", run, "--name", "a"], "evaluate": ["--checkpoint", run], "doctor": []}[job]
        line = refusal(job, "--data", shard_set, *given, "--stage", "s3://KEY:SECRET@bucket/stage")
        assert line == "error: --stage s3://bucket/stage is a URL: give a folder on each node's own disk"
    # A set that is being made holds tars too.
    (tmp_path / "begun" / "train").mkdir(parents=True)
    (tmp_path / "begun" / "train" / "train-000000.tar").write_bytes(b"")
    (tmp_path / "begun" / "unfinished.json").write_text("{}")
    assert "is unfinished" in refusal("look", "--data", tmp_path / "begun")


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


@pytest.mark.parametrize(
    ("group", "limits", "found"),
    [
        ("0::/", {"cpu.max": "max 100000"}, MANY),
        # docker --cpus 1.5, and --cpus 0.3
        ("0::/", {"cpu.max": "150000 100000"}, 2),
        ("0::/", {"cpu.max": "30000 100000"}, 1),
        # Kubernetes without a namespace of cgroups: the pod has less than the container asks for.
        ("0::/pod/one", {"pod/cpu.max": "300000 100000", "pod/one/cpu.max": "400000 100000", "cpu.max": "max 1"}, 3),
        ("0::/pod/one", {"pod/cpu.max": "300000 100000", "pod/two/cpu.max": "100000 100000"}, 3),
        # The path is the host's, and the container sees its own group at the top.
        ("0::/docker/0123", {"cpu.max": "500000 100000"}, 5),
        # Version 1
        ("3:cpuset:/\n2:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "350000", "cpu/a/cpu.cfs_period_us": "100000"}, 4),
        ("2:cpu,cpuacct:/a\n0::/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, MANY),
    ],
)
def test_the_cores_are_those_that_the_cgroups_leave(
    group: str, limits: dict[str, str], found: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(MANY)))
    (tmp_path / "groups").write_text(f"{group}\n")
    for name, text in limits.items():
        (tmp_path / "mount" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mount" / name).write_text(f"{text}\n")
    assert cores(tmp_path / "groups", tmp_path / "mount") == found
