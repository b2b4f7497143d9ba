"""The Makefile makes an environment with the Python that is there, and never harms another checkout's."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Stands in for `python -c`, which succeeds, and for `python -m venv FOLDER`, which makes a pip that does nothing.
PYTHON = """#!/bin/sh
echo "$(basename "$0") $*" >> "$CALLS"
[ "$2" != venv ] || { mkdir -p "$3/bin" && printf '#!/bin/sh\\n' > "$3/bin/pip" && chmod +x "$3/bin/pip"; }
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "check out"
    folder.mkdir()
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    (tmp_path / "bin").mkdir()
    for program in ("make", "sh", "rm", "mkdir", "touch", "test", "printf", "chmod", "basename", "awk"):
        found = shutil.which(program)
        assert found is not None
        (tmp_path / "bin" / program).symlink_to(found)
    return folder


def make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs make where no programs are but those that the fixture and the test put there."""
    return subprocess.run(
        ["make", *arguments],
        cwd=checkout,
        env={"PATH": str(checkout.parent / "bin"), "CALLS": str(checkout.parent / "calls")},
        capture_output=True,
        text=True,
        check=False,
    )


def add_python(checkout: Path, version: str) -> None:
    path = checkout.parent / "bin" / f"python{version}"
    path.write_text(PYTHON)
    path.chmod(0o755)


def test_it_takes_the_python_that_is_there(checkout: Path) -> None:
    add_python(checkout, "3.13")
    add_python(checkout, "3.12")
    done = make(checkout, "install")
    assert done.returncode == 0, done.stderr
    calls = (checkout.parent / "calls").read_text().splitlines()
    assert [call for call in calls if "venv" in call] == ["python3.12 -m venv .venv"]
    assert (checkout / ".venv" / ".installed").exists()
    assert "pip" not in make(checkout, "install").stdout


def test_without_a_python_it_says_which_to_install(checkout: Path) -> None:
    add_python(checkout, "3.10")
    done = make(checkout, "install")
    assert done.returncode != 0
    assert done.stderr.startswith("error: no Python 3.11, 3.12 or 3.13")


def test_a_linked_environment_is_not_emptied(checkout: Path) -> None:
    other = checkout.parent / "other"
    (other / "bin").mkdir(parents=True)
    (other / "bin" / "python").touch()
    (other / ".installed").touch()
    os.utime(other / ".installed", (0, 0))  # Older than this checkout's lock.
    (checkout / ".venv").symlink_to(other)
    add_python(checkout, "3.11")
    assert make(checkout, "install").returncode == 0
    assert (other / "bin" / "python").exists()
    assert not (checkout / ".venv").is_symlink()


def test_plain_make_lists_every_target(checkout: Path) -> None:
    text = (checkout / "Makefile").read_text()
    [phony] = [line.split(":")[1].split() for line in text.splitlines() if line.startswith(".PHONY")]
    assert [line.split()[1] for line in make(checkout).stdout.splitlines()] == phony
