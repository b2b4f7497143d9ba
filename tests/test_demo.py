"""The whole way as the demo goes it: shards, a Ray cluster with token authentication, `ray job submit`, evaluation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.photographs import write_source
from tests.processes import run_here

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_demo_on_ones_own_images(tmp_path: Path) -> None:
    source = write_source(tmp_path / "images", images=12)
    arguments = ["--source", str(source), "--output", str(tmp_path / "demo"), "--epochs", "1", "--batch-size", "10"]
    # In a shell that points at some other cluster, the demo still uses its own.
    environment = {**os.environ, "RAY_ADDRESS": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "jobs/demo.py", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
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
