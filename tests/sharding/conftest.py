"""A source and the set that it becomes, made once for all tests of this folder; none changes them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.photographs import write_source
from tests.shard_sets import make, planned


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """15 training and 3 validation images: four shards and one."""
    return write_source(tmp_path_factory.mktemp("source") / "images", images=6, longest=300)


@pytest.fixture(scope="session")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What they become, uninterrupted and without Ray."""
    return make(tmp_path_factory.mktemp("whole") / "set", planned(images))


@pytest.fixture
def source(images: Path, tmp_path: Path) -> Path:
    """A copy of the images to spoil."""
    return Path(shutil.copytree(images, tmp_path / "images"))
