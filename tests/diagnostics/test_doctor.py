"""The doctor: its checks on this machine and on made-up answers, and the command on a real Ray with real faults."""

from __future__ import annotations

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
from jobs.diagnostics.checks import judge, write_file
from jobs.diagnostics.probe import Rank
from jobs.doctor import DoctorConfig, examine
from tests import hosts
from tests.processes import outside_clusters

ROOT = Path(__file__).resolve().parents[2]
NO_HOSTS = hosts.missing()


def test_a_row_fails_with_who_did_not_answer_and_why() -> None:
    assert judge("a", {1: "16 files", 2: "16 files", 3: "32 files"}, "cure") == checks.Finding(
        "a", "ok", "16 files; 32 files"
    )
    assert judge("a", {1: "16 files", 2: NoAnswer("none")}, "cure") == checks.Finding("a", "failed", "2: none", "cure")
    many = judge("a", {number: NoAnswer("none") for number in range(7)}, "cure")
    assert many.found.endswith("4: none; and 2 more")


def test_where_all_must_be_alike_what_differs_is_named() -> None:
    must_match = judge("versions", {1: "python 3.11, ray 2.60", 2: "python 3.11, ray 2.60"}, "cure", must_match=True)
    assert must_match.status == "ok"
    other = judge("versions", {1: "python 3.11, ray 2.60", 2: "python 3.11, ray 2.61"}, "cure", must_match=True)
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


def test_gpus_where_there_are_none_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises(ValueError, match="Ray sees no GPU on this machine: leave it out"):
        next(examine(DoctorConfig(gpus=True)))


def test_the_graph_of_training_runs_where_a_worker_would() -> None:
    assert Rank().use_device("cpu") == "CPU"


def doctor(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = outside_clusters()
    return subprocess.run(
        [sys.executable, "jobs/doctor.py", *map(str, arguments)],
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_a_healthy_machine_passes_and_a_bad_storage_and_a_damaged_shard_are_named(
    shard_set: Path, tmp_path: Path
) -> None:
    common = ["--stage", tmp_path, "--workers", 2, "--json", tmp_path / "found.json"]
    done = doctor("--data", shard_set, "--storage", tmp_path / "runs", *common)
    found = {row["check"]: row for row in json.loads((tmp_path / "found.json").read_text())["findings"]}
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name for name, row in found.items() if row["status"] == "ok"} >= {"storage", "data", "disk", "all-reduce"}
    assert not list((tmp_path / "runs").iterdir())

    damaged = tmp_path / "damaged"
    shutil.copytree(shard_set, damaged)
    for tar in damaged.rglob("*.tar"):
        data = bytearray(tar.read_bytes())
        data[3000] ^= 1
        tar.write_bytes(data)
    # /proc can be written by nobody, root included.
    done = doctor("--data", damaged, "--storage", "/proc/runs", *common)
    written = json.loads((tmp_path / "found.json").read_text())
    assert (done.returncode, set(written["failed"])) == (1, {"storage", "data"})
    assert all(row["cure"] for row in written["findings"] if row["status"] == "failed")
    assert "verify_shards.py" in done.stdout


@pytest.mark.long
@pytest.mark.skipif(NO_HOSTS is not None, reason=str(NO_HOSTS))
def test_what_is_wrong_with_one_host_of_two_is_named(shard_set: Path, tmp_path: Path) -> None:
    local = tmp_path / "disk"
    poor = "ulimit -n 2048; mount -t tmpfs -o size=64m tmpfs /dev/shm; mount -o remount,size=10k $DISK"
    with hosts.cluster((1, 1), local, prepare={2: poor}) as two:
        submit = ["ray", "job", "submit", "--address", f"http://{hosts.NETWORK}.1:8265", "--working-dir", ROOT, "--"]
        where = ["--data", shard_set, "--storage", local / "runs", "--stage", local, "--workers", 2]
        found = tmp_path / "found.json"
        done = two[1].run(*submit, "python", "jobs/doctor.py", *where, "--json", found, timeout=240)
    rows = {row["check"]: row for row in json.loads(found.read_text())["findings"]}
    failed = {name for name, row in rows.items() if row["status"] == "failed"}
    assert (done.returncode, failed) == (1, {"storage", "disk", "open files", "/dev/shm"}), done.stdout
    for name in failed:
        assert f"{hosts.NETWORK}.2: " in rows[name]["found"]
        assert f"{hosts.NETWORK}.1: " not in rows[name]["found"]
    assert {name for name, row in rows.items() if row["status"] == "ok"} >= {"versions", "data", "all-reduce"}
