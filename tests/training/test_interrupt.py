"""When a checkpoint is due, who says so, and which failures end a run."""

from __future__ import annotations

import json
import pickle
import queue
import threading
from pathlib import Path

import pytest
import torch
from ray.train import ControllerError

from jobs.training import checkpoint, stop_signals, worker
from jobs.training.config import TrainConfig
from jobs.training.failures import FailureReporter
from jobs.training.run_state import CheckpointError
from jobs.training.run_storage import LocalDiskError, StorageError
from jobs.training.stop_signals import StopConsensus, clear_stop_request, stop_file, stop_requested
from model.training import StepAction, StoppedError, Trainer, Worker
from pipeline.dataset.info import DatasetError
from tests.model.test_training import IDENTITY, RECIPE, ManyBatches, make_trainer
from tests.ranks import run_ranks

SECONDS = 60.0
CPU = torch.device("cpu")


class Time:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_checkpoints_come_by_the_clock_and_count_from_the_last_one() -> None:
    clock = Time()
    consensus = StopConsensus(Worker(0, 1, CPU), 10.0, lambda: (None, None), print, clock)
    due = []
    for step in range(1, 13):
        clock.now += 3
        found = consensus.after_step(0.1)
        if found is StepAction.CHECKPOINT or step == 6:
            consensus.checkpointed()
            due.append((step, found))
    assert due == [(4, StepAction.CHECKPOINT), (6, StepAction.NOTHING), (10, StepAction.CHECKPOINT)]


def test_a_stop_is_followed_after_one_step_however_fast_those_before_were() -> None:
    """Steps that fit many times into a second, then one of a minute: what was announced within it counts at its end."""
    clock = Time()
    news: list[tuple[str | None, str | None]] = [(None, None)]
    consensus = StopConsensus(Worker(0, 1, CPU), 1800.0, lambda: news[0], lambda line: None, clock)
    for _ in range(1000):
        clock.now += 0.0001
        assert consensus.after_step(0.001) is StepAction.NOTHING
    clock.now += 60
    news[0] = ("SIGTERM to the driver", None)
    assert consensus.after_step(0.001) is StepAction.STOP


def test_a_stop_that_comes_during_validation_is_in_the_runs_folder_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through what reports in a real run, with three validation batches."""
    asked = 0

    class Poller:
        def __init__(self, *_: object) -> None: ...

        def news(self) -> tuple[str | None, None]:
            # After each of five steps nothing, then after the first validation batch nothing, after the second a stop.
            nonlocal asked
            asked += 1
            return ("SIGTERM to the driver" if asked == 7 else None), None

    monkeypatch.setattr(worker, "StopRequestPoller", Poller)
    (tmp_path / "run").mkdir()
    reporter = worker.Reporter(TrainConfig("set", str(tmp_path), "run"), IDENTITY, Worker(0, 1, CPU), 5, [])
    trainer = Trainer(make_trainer().network, RECIPE, Worker(0, 1, CPU))
    with pytest.raises(StoppedError):
        trainer.fit(ManyBatches(), reporter)
    reporter.wait()
    reporter.close("stopped")
    assert asked == 7
    assert list(checkpoint.committed(str(tmp_path / "run"))) == ["checkpoint_0000_000005"]


def test_a_word_to_stop_is_followed_and_a_drain_has_one_checkpoint() -> None:
    said: list[str] = []
    clock = Time()
    news = iter([(None, None), (None, "node a"), (None, "node a"), (None, "node a"), ("SIGTERM to the driver", None)])
    consensus = StopConsensus(Worker(0, 1, CPU), None, lambda: next(news), said.append, clock)
    found = []
    for _ in range(5):
        clock.now += 2
        found.append(consensus.after_step(0.1))
    assert found == [StepAction.NOTHING, StepAction.CHECKPOINT, StepAction.NOTHING, StepAction.NOTHING, StepAction.STOP]
    assert said == [
        "draining: node a; writing a checkpoint, then going on until the node is taken",
        "SIGTERM to the driver: writing a checkpoint, then leaving",
    ]


def exchange(rank: int, world: int, folder: Path) -> None:
    """Three workers whose clocks differ; only worker 0's and its news count, and worker 2 is slow for a while."""
    clock = Time()
    said: list[str] = []
    news = iter([(None, None)] * 9 + [("stop", None)])
    consensus = StopConsensus(Worker(rank, world, CPU), 10.0, lambda: next(news), said.append, clock)
    found = []
    for step in range(10):
        clock.now += 4 if rank == 0 else 100.0 * rank
        found.append(consensus.after_step(3.0 if rank == 2 and step not in (0, 3) else 1.0).name)
    (folder / f"{rank}.json").write_text(json.dumps([found, said]))


def test_all_workers_find_the_same_due_and_the_slow_one_says_so(tmp_path: Path) -> None:
    run_ranks(3, tmp_path, exchange, tmp_path)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    # Nobody tells these workers that the checkpoint was written, so it stays due.
    assert [found for found, _ in results] == [["NOTHING", "NOTHING", *["CHECKPOINT"] * 7, "STOP"]] * 3
    assert results[0][1] == ["stop: writing a checkpoint, then leaving"]
    assert results[1][1] == []
    # Slow for two exchanges is not said, for six it is once.
    (line,) = results[2][1]
    assert line.startswith("rank 2 on ")
    assert "is slow: 3.00 s a step for its data and forward pass, the others 1.00 s" in line


def test_a_stop_request_is_cleared_made_and_read(tmp_path: Path) -> None:
    """What stopped a run does not stop the same command."""
    run = str(tmp_path)
    assert stop_requested(*stop_file(run)) is None
    (tmp_path / "STOP").write_text("WHY\n")
    assert stop_requested(*stop_file(run)) == "WHY"
    clear_stop_request(run)
    assert stop_requested(*stop_file(run)) is None


def test_a_lost_worker_is_named_and_a_node_that_is_taken_is_no_failure(capsys: pytest.CaptureFixture[str]) -> None:
    class Taken(Exception):
        preempted = True

    reporter = FailureReporter(1)
    # Ray Train repeats these until the node is gone.
    for error in [Taken("the actor died")] * 3 + [RuntimeError("lost\nat line 3")] * 2:
        reporter.after_exception(object(), {1: error})
    assert capsys.readouterr().out.splitlines() == [
        "a node was taken: rank 1: Taken: the actor died; starting again from the last checkpoint",
        "failure 1 of at most 2: rank 1: RuntimeError: lost; starting again from the last checkpoint",
        "failure 2 of at most 2: rank 1: RuntimeError: lost; giving up",
    ]


def test_the_poller_lives_through_whatever_a_look_raises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    looks = iter([OSError("Unable to connect"), RuntimeError("no such thing"), None, ValueError("half"), "because"])
    said: queue.Queue[str] = queue.Queue()
    ended = threading.Event()

    def look(*_: object) -> str | None:
        found = next(looks)
        if isinstance(found, Exception):
            raise found
        if found:
            ended.set()
        return found

    monkeypatch.setattr(stop_signals, "stop_requested", look)
    monkeypatch.setattr(stop_signals, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(stop_signals, "draining", lambda: None)
    poller = stop_signals.StopRequestPoller(str(tmp_path), said.put)
    assert ended.wait(SECONDS)
    # Once for each time that it begins to fail.
    assert [said.get(timeout=SECONDS) for _ in range(2)] == [
        "warning: no stop request can be read, trying on: Unable to connect",
        "warning: no stop request can be read, trying on: half",
    ]
    assert said.empty()
    while poller.news()[0] is None:
        threading.Event().wait(0.001)
    assert poller.news() == ("because", None)


def test_a_stop_that_cannot_be_written_is_one_line_and_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter([PermissionError(13, "Permission denied"), OSError("refused"), None])
    asked = []

    def write(run: str, reason: str) -> None:
        asked.append(reason)
        if (error := next(answers)) is not None:
            raise error

    monkeypatch.setattr(stop_signals, "request_stop", write)
    monkeypatch.setattr(stop_signals, "POLL_SECONDS", 0.0)
    stop_signals.insist_on_stop("s3://key:secret@runs/here?secret", "SIGTERM to the driver", threading.Event())
    assert asked == ["SIGTERM to the driver"] * 3
    line = (
        "warning: SIGTERM to the driver, but the stop cannot be written to s3://runs/here: [Errno 13] Permission denied"
    )
    assert capsys.readouterr().err == line + "\n"


@pytest.mark.parametrize("kind", [CheckpointError, DatasetError, LocalDiskError, StorageError])
def test_what_another_start_cannot_help_ends_the_run(kind: type[ValueError]) -> None:
    error = pickle.loads(pickle.dumps(kind("cause and cure")))
    with pytest.raises(ControllerError) as raised:
        FailureReporter(3).after_exception(object(), {0: RuntimeError("lost"), 1: error})
    assert raised.value.controller_failure is error
