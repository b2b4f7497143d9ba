"""What `ray job submit --working-dir .` takes along: the code, and no shard, tar or run that lies beside it."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

from ray._private.runtime_env.packaging import create_package

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jobs", "model", "pipeline")


def test_a_job_takes_the_code_and_nothing_else_along(tmp_path: Path) -> None:
    here = tmp_path / "here"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, here / package, ignore=shutil.ignore_patterns("__pycache__"))
    code = {str(path.relative_to(here)) for path in here.rglob("*") if path.is_file()}
    for name in (".gitignore", ".rayignore", "README.md"):
        shutil.copy(ROOT / name, here)
    for name in (
        "shards/train/train-000000.tar",
        "runs/first/run.json",
        "ILSVRC2012_img_train.tar",
        ".venv/bin/python",
    ):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(b"large")
    (here / "jobs" / "__pycache__").mkdir()
    (here / "jobs" / "__pycache__" / "train.cpython-311.pyc").write_bytes(b"")
    create_package(str(here), tmp_path / "package.zip", include_gitignore=True)
    taken = {name for name in zipfile.ZipFile(tmp_path / "package.zip").namelist() if not name.endswith("/")}
    assert taken == code
