"""Two hosts with a Ray each: what only goes wrong where machines do not share an address, a name or a disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.training import checkpoint
from tests import hosts
from tests.hosts import Host
from tests.photographs import build_shard_set, write_source

pytestmark = [pytest.mark.slow, hosts.NEEDED]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both hosts see, but for its folder "disk"."""
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[list[Host]]:
    """Two hosts with one core each, so that of two workers each has one."""
    with hosts.cluster((1, 1), folder / "disk") as two:
        yield two


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    """9 training images, two steps of four, and 3 to validate with."""
    return build_shard_set(write_source(folder / "images", images=4), folder / "shards")


def submit(host: Host, job: str, *arguments: object) -> tuple[int, str]:
    """Exit status and output of a job that a host submits."""
    done = host.run(*hosts.SUBMIT, f"jobs/{job}.py", *arguments, timeout=300)
    return done.returncode, done.stdout + done.stderr


def test_two_workers_on_two_hosts_train_and_leave_a_checkpoint(pair: list[Host], folder: Path, data: Path) -> None:
    # The name of each host leads to 127.0.1.1, where Gloo would listen by itself, and nobody would come.
    stage = folder / "disk" / "stage"
    run = ["--data", data, "--stage", stage, "--storage", folder / "runs", "--name", "pair"]
    code, output = submit(
        pair[1], "train", *run, "--workers", 2, "--no-gpus", "--batch-size", 4, "--epochs", 1, "--log-every", 1
    )
    assert code == 0, output
    [(_, state)] = checkpoint.committed(str(folder / "runs" / "pair")).items()
    [row] = state.progress.history
    assert (state.progress.finished, row["images"], row["val_images"]) == (True, 8, 3)
    # A worker that ran on each host has staged the set to that host's own disk.
    assert all(list(host.path(stage).rglob("*.tar")) for host in pair)
    assert not stage.exists()


def test_the_doctor_finds_the_storage_that_is_not_shared_and_nothing_else(
    pair: list[Host], folder: Path, data: Path
) -> None:
    options = ["--data", data, "--storage", folder / "disk" / "runs", "--stage", folder / "disk", "--workers", 2]
    code, output = submit(pair[1], "doctor", *options, "--json", folder / "found.json")
    assert (code, "checks failed" in output) == (1, True), output
    found = {row["check"]: row for row in json.loads((folder / "found.json").read_text())["findings"]}
    assert {name for name, row in found.items() if row["status"] == "failed"} == {"storage"}, output
    assert found["storage"]["found"] == "10.77.0.2: does not read what another node wrote"
    assert not [name for name, row in found.items() if row["status"] == "skipped"]
    assert "gloo, 2 rank(s)" in found["all-reduce"]["found"]
