"""The doctor: its checks on this machine and on made-up answers, and the command on a real Ray with real faults."""

from __future__ import annotations

import contextlib
import functools
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cluster.nodes import NoAnswer
from jobs.diagnostics import checks
from jobs.diagnostics.checks import Finding, judge, write_file
from jobs.diagnostics.probe import Rank
from jobs.doctor import DoctorConfig, main
from pipeline.dataset.info import DatasetError
from tests import ROOT
from tests.damage import flip_bit, own_copy
from tests.processes import outside_clusters


def test_a_row_fails_with_who_did_not_answer_and_why() -> None:
    assert judge("a", {1: "16 files", 2: "16 files", 3: "32 files"}, "cure") == Finding("a", "ok", "16 files; 32 files")
    assert judge("a", {1: "16 files", 2: NoAnswer("none")}, "cure") == Finding("a", "failed", "2: none", "cure")
    many = judge("a", {number: NoAnswer("none") for number in range(7)}, "cure")
    assert many.found.endswith("4: none; and 2 more")
    alike = {1: "python 3.11, ray 2.60", 2: "python 3.11, ray 2.60"}
    assert judge("versions", alike, "cure", must_match=True).status == "ok"
    other = judge("versions", {**alike, 2: "python 3.11, ray 2.61"}, "cure", must_match=True)
    assert (other.status, other.found) == ("failed", "1 has ray 2.60; 2 has ray 2.61")


def test_a_node_without_room_is_refused(shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = functools.partial(checks.disk, str(shard_set), str(tmp_path / "not" / "yet"))
    assert "GB free" in disk()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(total=64 * 2**20, free=1000))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    for check in (disk, checks.shared_memory, checks.open_files):
        with pytest.raises(ValueError, match="needed"):
            check()


def test_a_storage_must_show_what_another_node_wrote(tmp_path: Path) -> None:
    given = (str(tmp_path / "runs"), ".doctor-1")
    with pytest.raises(ValueError, match="does not read what another node wrote"):
        checks.storage(*given)
    write_file(*given)
    checks.storage(*given)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".doctor-1"]
    # Which nobody can write, root included.
    with pytest.raises(OSError, match="/proc/runs"):
        checks.storage("/proc/runs", ".doctor-1")


def test_the_graph_of_training_runs_where_a_worker_would() -> None:
    assert Rank().use_device("cpu") == "CPU"


def test_a_damaged_shard_is_found(shard_set: Path, tmp_path: Path) -> None:
    damaged = own_copy(shard_set, tmp_path / "damaged")
    assert "60 images" in checks.data(str(damaged))
    for tar in damaged.rglob("*.tar"):
        flip_bit(tar, 3000)
    with pytest.raises(DatasetError, match=r"verify_shards\.py"):
        checks.data(str(damaged))


def test_what_failed_is_printed_with_its_cure_and_ends_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [Finding("disk", "ok", "9 GB free"), Finding("storage", "failed", "it is away", "mount it")]
    started: list[tuple[object, ...]] = []

    def connected(*arguments: object, **_: object) -> contextlib.AbstractContextManager[None]:
        started.append(arguments)
        return contextlib.nullcontext()

    monkeypatch.setattr("jobs.doctor.connected", connected)
    monkeypatch.setattr("jobs.doctor.examine", lambda config: iter(rows))
    with pytest.raises(ValueError, match=r"1 of 2 checks failed \(storage\)"):
        main(DoctorConfig(workers=1000, json=tmp_path / "found.json"))
    # With the cores that training will have, however many workers are asked for.
    assert started == [()]
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["OK", "disk", "9", "GB", "free"],
        ["FAILED", "storage", "it", "is", "away"],
        ["cure:", "mount", "it"],
    ]
    assert json.loads((tmp_path / "found.json").read_text())["failed"] == ["storage"]


@pytest.mark.slow
def test_a_healthy_machine_passes(shard_set: Path, tmp_path: Path) -> None:
    options = ["--data", shard_set, "--storage", tmp_path / "runs", "--stage", tmp_path, "--workers", 2]
    done = subprocess.run(
        [sys.executable, "jobs/doctor.py", *map(str, options), "--json", tmp_path / "found.json"],
        cwd=ROOT,
        env={**outside_clusters(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {row["check"]: row for row in json.loads((tmp_path / "found.json").read_text())["findings"]}
    assert {name for name, row in found.items() if row["status"] == "ok"} >= {"storage", "data", "disk", "all-reduce"}
    assert not list((tmp_path / "runs").iterdir())
