"""A finished run that many tests compare with and none changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import undisturbed


@pytest.fixture(scope="session")
def pair(shard_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two workers and two epochs, never disturbed."""
    return undisturbed(shard_set, tmp_path_factory.mktemp("pair"), 2, 2)
