"""The whole way as the demo goes it: shards, training, evaluation; and what a submitted job takes along."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package

from tests.photographs import write_source
from tests.processes import below, run_here
from tests.runs import ROOT, Followed

ENDED_S = 60.0  # For what Ray ends without waiting for it, on a busy machine.
BESIDE = (
    "shards/train/train-000000.tar",
    "runs/first/run.json",
    "ILSVRC2012_img_train.tar",
    ".venv/bin/python",
    "jobs/__pycache__/train.cpython-311.pyc",
)


def start(folder: Path, epochs: int) -> Followed:
    """The demo on three classes of twelve images, with one worker."""
    source = write_source(folder / "images", images=12)
    arguments = ["--source", source, "--output", folder / "demo", "--epochs", epochs, "--batch-size", 10]
    # In a shell that points at some cluster, the demo still uses this machine.
    process = subprocess.Popen(
        [sys.executable, "jobs/demo.py", *map(str, arguments), "--workers", "1"],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": "http://127.0.0.1:9"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    return Followed(process)


@pytest.mark.slow
def test_the_demo_on_ones_own_images(tmp_path: Path) -> None:
    done = start(tmp_path, epochs=1)
    assert done.end() == 0, done.text
    assert "Guessing among 3 classes would have 66.7%" in done.text
    for crops in ("center crop", "ten crops"):
        assert f"{crops}, 3 images" in done.text
    assert "<svg" in (tmp_path / "demo" / "report.html").read_text()


def test_a_source_that_is_not_there_ends_the_demo_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    done = run_here("demo", "--source", tmp_path / "none", "--output", tmp_path / "demo")
    assert done.returncode == 1
    assert done.stderr.startswith("error: `")
    # What its first command says.
    assert f"error: {tmp_path / 'none'} does not exist" in capfd.readouterr().err
    assert not (tmp_path / "demo" / "shards").exists()


@pytest.mark.slow
def test_a_sigterm_to_the_demo_ends_all_that_it_started(tmp_path: Path) -> None:
    run = start(tmp_path, epochs=100)
    run.wait_for("epoch 1/100")
    started = below(run.process.pid)
    assert any(line.startswith("ray::RayTrainWorker") for line in started.values())
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 128 + signal.SIGTERM, run.text
    deadline = time.monotonic() + ENDED_S
    # Whoever has lost its parent is below another one.
    while left := {line for pid, line in below(0).items() if pid in started}:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def test_a_job_takes_the_code_and_nothing_else_along(tmp_path: Path) -> None:
    here = tmp_path / "here"
    for package in ("jobs", "model", "pipeline"):
        shutil.copytree(ROOT / package, here / package, ignore=shutil.ignore_patterns("__pycache__"))
    code = {str(path.relative_to(here)) for path in here.rglob("*") if path.is_file()}
    for name in (".gitignore", ".rayignore", "README.md"):
        shutil.copy(ROOT / name, here)
    for name in BESIDE:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(b"large")
    create_package(str(here), tmp_path / "package.zip", include_gitignore=True)
    taken = {name for name in zipfile.ZipFile(tmp_path / "package.zip").namelist() if not name.endswith("/")}
    assert taken == code
