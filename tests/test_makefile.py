"""The Makefile makes an environment with the Python that is there, and never harms another checkout's."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import ROOT

# Stands in for `python -c`, which succeeds, and for `python -m venv FOLDER`, which makes a python and a pip alike.
# `pip config list` prints what CONFIG holds.
PYTHON = """#!/bin/sh
echo "$(basename "$0") $*" >> "$CALLS"
[ "$1" != config ] || printf "$CONFIG"
[ "$2" != venv ] || { mkdir -p "$3/bin" && cp "$0" "$3/bin/pip" && cp "$0" "$3/bin/python"; }
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "check out"
    folder.mkdir()
    for name in ("Makefile", "requirements.lock", "requirements-test.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    (tmp_path / "bin").mkdir()
    for program in ("make", "sh", "rm", "mkdir", "touch", "test", "printf", "cp", "basename"):
        found = shutil.which(program)
        assert found is not None
        (tmp_path / "bin" / program).symlink_to(found)
    return folder


def make(checkout: Path, *arguments: str, config: str = "") -> subprocess.CompletedProcess[str]:
    """Runs make where no programs are but those that the fixture and the test put there."""
    return subprocess.run(
        ["make", *arguments],
        cwd=checkout,
        env={"PATH": str(checkout.parent / "bin"), "CALLS": str(checkout.parent / "calls"), "CONFIG": config},
        capture_output=True,
        text=True,
        check=False,
    )


def add(checkout: Path, program: str) -> None:
    path = checkout.parent / "bin" / program
    path.write_text(PYTHON)
    path.chmod(0o755)


def calls(checkout: Path, part: str) -> list[str]:
    """The commands that hold `part`, in their order."""
    return [line for line in (checkout.parent / "calls").read_text().splitlines() if part in line]


def test_it_takes_the_python_that_is_there_or_says_which_to_install(checkout: Path) -> None:
    add(checkout, "python3.10")
    done = make(checkout, "install")
    assert done.returncode != 0
    assert done.stderr.startswith("error: no Python 3.11, 3.12 or 3.13")
    add(checkout, "python3.13")
    add(checkout, "python3.12")
    done = make(checkout, "install")
    assert done.returncode == 0, done.stderr
    assert calls(checkout, "-m venv") == ["python3.12 -m venv .venv"]
    assert (checkout / ".venv" / ".installed").exists()


def test_what_runs_needs_one_lock_and_what_tests_another(checkout: Path) -> None:
    add(checkout, "python3.11")
    pip = "pip install --disable-pip-version-check --quiet"
    wanted = [f"{pip} -r requirements.lock", f"{pip} --no-deps --editable ."]
    for target in ("install", "demo", "look"):
        done = make(checkout, target)
        assert calls(checkout, "pip install") == wanted
    assert "there is no shard set at demo/shards: make one with 'make demo'" in done.stderr
    for target in ("test", "lint"):
        make(checkout, target)
        assert calls(checkout, "pip install") == [*wanted, f"{pip} -r requirements-test.lock"]


def test_uv_installs_unless_pip_is_configured(checkout: Path) -> None:
    add(checkout, "python3.11")
    add(checkout, "uv")
    for config, program in (("", "uv pip"), ("global.index-url='https://example.com'", "pip")):
        assert make(checkout, "install", "--always-make", config=config).returncode == 0
        assert calls(checkout, "-r requirements.lock")[-1].startswith(f"{program} install ")


def test_a_linked_environment_is_not_emptied(checkout: Path) -> None:
    other = checkout.parent / "other"
    (other / "bin").mkdir(parents=True)
    (other / "bin" / "python").touch()
    (other / ".installed").touch()
    os.utime(other / ".installed", (0, 0))  # Older than this checkout's lock.
    (checkout / ".venv").symlink_to(other)
    add(checkout, "python3.11")
    assert make(checkout, "install").returncode == 0
    assert (other / "bin" / "python").exists()
    assert not (checkout / ".venv").is_symlink()
