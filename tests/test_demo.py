"""The whole way as the demo goes it: shards, a Ray cluster with token authentication, `ray job submit`, evaluation; and
what a submitted job takes along.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package

from jobs import demo
from tests.photographs import write_source
from tests.processes import run_here

ROOT = Path(__file__).resolve().parent.parent
AGENT_PORT = 52365  # Ray's default
BESIDE = (
    "shards/train/train-000000.tar",
    "runs/first/run.json",
    "ILSVRC2012_img_train.tar",
    ".venv/bin/python",
    "jobs/__pycache__/train.cpython-311.pyc",
)


@pytest.mark.slow
def test_the_demo_on_ones_own_images(tmp_path: Path) -> None:
    source = write_source(tmp_path / "images", images=12)
    arguments = ["--source", str(source), "--output", str(tmp_path / "demo"), "--epochs", "1", "--batch-size", "10"]
    arguments += ["--workers", "1"]
    # In a shell that points at some other cluster, the demo still uses its own.
    environment = {**os.environ, "RAY_ADDRESS": "http://127.0.0.1:9"}
    command = [sys.executable, "jobs/demo.py", *arguments]
    with socket.socket() as taken:
        # As by the agent of another Ray, which may be there.
        with contextlib.suppress(OSError):
            taken.bind(("", AGENT_PORT))
            taken.listen()
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "$ ray job submit" in done.stdout
    assert "Guessing among 3 classes would have 66.7%" in done.stdout
    for crops in ("center crop", "ten crops"):
        assert f"{crops}, 3 images" in done.stdout
    assert "<svg" in (tmp_path / "demo" / "report.html").read_text()


def test_a_source_that_is_not_there_ends_the_demo_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    done = run_here("demo", "--source", tmp_path / "none", "--output", tmp_path / "demo")
    assert done.returncode == 1
    assert done.stderr.startswith("error: `")
    # What its first command says.
    assert f"error: {tmp_path / 'none'} does not exist" in capfd.readouterr().err


def test_a_sigterm_to_the_demo_ends_the_ray_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[bool] = []

    @contextlib.contextmanager
    def cluster(*_: object) -> Iterator[str]:
        try:
            yield "http://127.0.0.1:9"
        finally:
            ended.append(True)

    def call(arguments: list[str], environment: dict[str, str]) -> None:
        if "submit" in arguments:
            signal.raise_signal(signal.SIGTERM)

    # Where the demo leaves it as it is, the test fails and lives.
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("it would end at once"))
    monkeypatch.setattr(demo, "ray_cluster", cluster)
    monkeypatch.setattr(demo, "call", call)
    try:
        with pytest.raises(SystemExit) as found:
            demo.main(demo.DemoConfig(tmp_path / "demo", source=tmp_path))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert found.value.code == 128 + signal.SIGTERM
    assert ended


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
