"""What ends a run on one machine in order: SIGTERM and Ctrl-C, to its process or to all of its group; what must not."""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.training import checkpoint
from jobs.training import stop_signals as interrupt
from jobs.training.checkpoint import MODEL_FILE
from jobs.training.stop_signals import signals_stop
from tests.processes import refusal
from tests.runs import Run, command

EPOCHS = 100  # More than a run gets to here.
SECONDS = 10.0


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C as in a terminal, though these tests be run in the background, where shells have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_two_signals_at_once_ask_once_and_a_later_one_leaves(
    signum: signal.Signals, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    # Under nohup, this process ignores a hangup.
    before = signal.signal(signum, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signum, before))
    asked: queue.Queue[str] = queue.Queue()
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        # After a hangup, each write to the terminal fails.
        if signum is signal.SIGHUP:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(interrupt, "log", say)
    monkeypatch.setattr(interrupt, "request_stop", lambda run, reason: asked.put(reason))
    with interruptible(), signals_stop("run"):
        # As timeout(1) does: one to the process, one to its group.
        os.kill(os.getpid(), signum)
        os.kill(os.getpid(), signum)
        assert asked.get(timeout=SECONDS) == f"{signum.name} to the driver"
        monkeypatch.setattr(interrupt, "AGAIN_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signum)
    assert asked.empty()
    [line] = said
    assert line.startswith(f"{signum.name}: a checkpoint is written after the next step; a second one leaves at once")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_what_was_started_to_live_through_a_signal_does(signum: signal.Signals) -> None:
    """As a shell starts what goes to the background, and nohup what shall live through a hangup."""
    before, other = signal.signal(signum, signal.SIG_IGN), signal.getsignal(signal.SIGTERM)
    try:
        with signals_stop("run"):
            assert signal.getsignal(signum) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not other
        assert signal.getsignal(signal.SIGTERM) is other
    finally:
        signal.signal(signum, before)


@pytest.mark.slow
def test_ctrl_c_ends_a_run_that_began_with_given_weights_with_a_checkpoint(
    pair: Path, shard_set: Path, tmp_path: Path
) -> None:
    """To its group, as a terminal sends it. At a rate of 0 the weights stay as they are."""
    given = pair / "checkpoint_0002_000000"
    flags = ("--lr", 0, "--init-from", given)
    with interruptible():
        run = Run(shard_set, str(tmp_path), 1, EPOCHS, *flags, checkpoint_every=0)
    run.wait_for(f"starting with the weights of {given}")
    run.wait_for("epoch 1/100 step 1/5")
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.end() == 1, run.text
    assert "failure" not in run.text
    assert "SIGINT to the driver: writing a checkpoint, then leaving" in run.text
    (name, state), *_ = reversed(checkpoint.committed(str(tmp_path / "run")).items())
    assert run.lines[-1] == (
        f"error: stopped after epoch {state.progress.epoch}, step {state.progress.step}, with a checkpoint: run the "
        "same command again to continue\n"
    )
    assert (tmp_path / "run" / name / MODEL_FILE).read_bytes() == (given / MODEL_FILE).read_bytes()
    assert state.identity.init_from == str(given)
    line = refusal("train", *command(shard_set, str(tmp_path), 1, EPOCHS, "--lr", 0, "--init-from", pair)[1:])
    assert f"the initial weights are {pair}, were {given} (leave --init-from out)" in line
