"""Of several commands on one run, one is at work, and the others are told which."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import pytest

from jobs.training import owner
from jobs.training.owner import DEAD_SECONDS, PREFIX, Claim, OwnedError, Owner, owned
from tests.processes import refusal
from tests.shard_sets import s3_options

FAR = Owner("far", 7, "1", "another machine")
NEAR = Owner.here()


@pytest.fixture(params=["disk", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path / "runs" / "run")
    return f"s3://runs/here/run{s3_options(request.getfixturevalue('s3'))}"


def test_a_second_command_is_refused_by_name_and_the_next_one_is_not(run: str) -> None:
    with owned("runs", run, FAR):
        with pytest.raises(OwnedError) as raised, owned("runs", run):
            pass
        text = str(raised.value)
        assert text.startswith("process 7 on far is at work on the run ")
        assert "run: wait for it to end, or give another --name; it was there " in text
        assert text.endswith(f"the same command takes the run over after {DEAD_SECONDS:.0f} s more")
        assert "endpoint" not in text
    with owned("runs", run):
        pass


@pytest.mark.parametrize("text", [json.dumps(dataclasses.asdict(FAR) | {"new": 1}), "{"])
def test_a_claim_that_cannot_be_read_refuses_until_it_is_silent(text: str, tmp_path: Path) -> None:
    """A later version's, or half a one."""
    file = tmp_path / f"{PREFIX}x.json"
    file.write_text(text)
    with pytest.raises(OwnedError, match=r"on an unknown host \(owner-x\.json .*the run over after 1[78]\d s more$"):
        Claim(str(tmp_path), NEAR).take()
    assert list(tmp_path.iterdir()) == [file]
    os.utime(file, (time.time() - DEAD_SECONDS - 1,) * 2)
    Claim(str(tmp_path), NEAR).take()
    assert not file.exists()


def test_train_is_refused_before_it_starts_anything(shard_set: Path, tmp_path: Path) -> None:
    with owned(str(tmp_path), str(tmp_path / "run")):
        line = refusal("train", "--data", shard_set, "--storage", tmp_path, "--name", "run", "--batch-size", 9)
    told = f"error: process {os.getpid()} on {NEAR.host} is at work on the run {tmp_path}/run: wait for it to end, or "
    assert line == told + "give another --name"


def test_of_many_commands_at_once_one_goes_on(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each on a host of its own; who comes first keeps the run until all have been answered."""
    monkeypatch.setattr(owner, "MAX_WAIT_S", 0.05)
    count = 4
    begin, answered = threading.Barrier(count, timeout=60), threading.Barrier(count, timeout=120)

    def contend(number: int) -> bool:
        claim = Claim(run, Owner(f"host{number}", number, "1", f"machine {number}"))
        begin.wait()
        try:
            claim.take()
        except OwnedError:
            return False
        finally:
            answered.wait()
        return True

    with ThreadPoolExecutor(count) as pool:
        owners = sum(pool.map(contend, range(count)))
    assert owners <= 1
    # They may all have taken theirs back in turn, as those do who always begin together; another comes through then.
    if not owners:
        Claim(run, FAR).take()


def test_a_killed_command_is_followed_at_once_on_its_machine(tmp_path: Path) -> None:
    run = tmp_path / "run"
    text = "import sys, time; from jobs.training.owner import Claim, Owner; Claim(sys.argv[1], Owner.here()).take(); "
    command = [sys.executable, "-c", text + "print('mine', flush=True); time.sleep(600)", str(run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "mine\n"
    with pytest.raises(OwnedError, match=rf"process {process.pid} on {NEAR.host} is at work"), owned("runs", str(run)):
        pass
    process.kill()
    # Not even waited for: a zombie owns nothing.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with owned("runs", str(run)):
        (claim,) = run.glob(f"{PREFIX}*")
        assert json.loads(claim.read_text())["pid"] == os.getpid()
    process.wait()
    process.stdout.close()
    assert not list(run.iterdir())


def test_a_pid_that_is_used_again_is_another_process() -> None:
    assert NEAR.lives(NEAR, 0.0)
    assert not dataclasses.replace(NEAR, started="1").lives(NEAR, 0.0)
    # In another container, or after a restart, the pid says nothing.
    other = dataclasses.replace(NEAR, started="1", machine="other")
    assert other.lives(NEAR, DEAD_SECONDS - 1)
    assert not other.lives(NEAR, DEAD_SECONDS)


@pytest.mark.parametrize("shown", [FileNotFoundError, PermissionError])
def test_another_users_process_that_proc_hides_lives_until_it_is_silent(
    shown: type[OSError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with hidepid=2 and hidepid=1."""

    def fail(error: type[OSError]) -> NoReturn:
        raise error

    monkeypatch.setattr(Path, "read_text", lambda *_: fail(shown))
    monkeypatch.setattr(os, "kill", lambda *_: fail(PermissionError))
    assert NEAR.lives(NEAR, DEAD_SECONDS - 1)
    assert not NEAR.lives(NEAR, DEAD_SECONDS)


def test_a_silent_command_is_followed_after_the_stated_time_and_leaves_if_it_comes_back(tmp_path: Path) -> None:
    claim = Claim(str(tmp_path), FAR)
    claim.take()
    (file,) = tmp_path.iterdir()
    for silent, taken in ((DEAD_SECONDS - 30, False), (DEAD_SECONDS + 1, True)):
        os.utime(file, (time.time() - silent,) * 2)
        second = Claim(str(tmp_path), dataclasses.replace(FAR, host="second", machine="second"))
        if taken:
            second.take()
        else:
            with pytest.raises(OwnedError, match=r"it was there 150 s ago, .*the run over after 30 s more"):
                second.take()
            assert claim.renew()
            with pytest.raises(OwnedError, match="it was there 0 s ago"):
                second.take()
    assert not file.exists()
    # A renewal that began before the take-over may end after it.
    claim._write(settled=True)
    assert second.renew()
    assert not file.exists()
    assert not claim.renew()
    over = threading.Event()
    owner._beat(claim, over, lost=over.set, seconds=0.0)
    assert over.is_set()
    # A claim that was only removed, as by a cleaner, is written anew.
    second.release()
    assert claim.renew()
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
