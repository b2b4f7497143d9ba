"""Stops that are announced: SIGTERM or Ctrl-C to the driver, SIGTERM to a worker, and a spot node's drain.

Whoever gets the signal leaves a word in the cluster's key-value store; worker 0 looks for it in a thread of its own,
and the workers' next exchange (`Beat`) tells all of them, so that they write one checkpoint at the same step.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
import torch
from ray.experimental import internal_kv
from ray.train.v2._internal.execution.callback import WorkerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.context import get_train_context
from torch import distributed

from model.training import Due, Worker

LOOK_SECONDS = 1.0
BEAT_SECONDS = 1.0  # Between exchanges; a step that takes longer has one each.
AGAIN_SECONDS = 1.0  # A person who insists takes longer than timeout(1), which signals the process and its group.
SLOW = 2.0  # Times the other workers' median
SLOW_EXCHANGES = 3  # In a row, before it is said: any machine stumbles.
_NAMESPACE = "alexnet-trainer"


def _key() -> str:
    return f"stop/{ray.get_runtime_context().get_job_id()}"


def ask_to_stop(reason: str) -> None:
    """Leaves the word for this job's workers; the first reason stays."""
    internal_kv._internal_kv_put(_key(), reason, overwrite=False, namespace=_NAMESPACE)


def asked_to_stop() -> str | None:
    """Why this job's workers shall stop, or None."""
    word = internal_kv._internal_kv_get(_key(), namespace=_NAMESPACE)
    return None if word is None else word.decode()


@contextlib.contextmanager
def signals_stop() -> Iterator[None]:
    """While it lasts, SIGTERM or SIGINT (Ctrl-C) to this process, the driver, asks the workers to stop.

    A later one is a KeyboardInterrupt.
    """
    seen = threading.Event()
    over = threading.Event()
    first, name = 0.0, ""

    def handle(signum: int, frame: object) -> None:
        nonlocal first, name
        if not seen.is_set():
            first, name = time.monotonic(), signal.Signals(signum).name
        elif time.monotonic() - first > AGAIN_SECONDS:
            raise KeyboardInterrupt
        seen.set()

    def tell() -> None:
        # In a thread, because a handler may interrupt the very call to Ray that it would make.
        seen.wait()
        if not over.is_set():
            line = f"{name}: a checkpoint is written after the step under way; a second one leaves without it"
            print(line, file=sys.stderr, flush=True)
            ask_to_stop(f"{name} to the driver")

    threading.Thread(target=tell, daemon=True).start()
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    for signum, was in before.items():
        # Shells let what they start in the background, and nohup lets all, live through a Ctrl-C.
        if was is not signal.SIG_IGN:
            signal.signal(signum, handle)
    try:
        yield
    finally:
        for signum, was in before.items():
            signal.signal(signum, was)
        over.set()
        seen.set()


_dismissed = threading.Event()
"""In a worker: Ray Train is about to end this process, for which Ray uses SIGTERM, too."""


class SigtermInWorkers(WorkerGroupCallback, WorkerCallback):
    """Lets SIGTERM to a worker ask all of them to stop, instead of ending that one."""

    def after_worker_group_start(self, worker_group: Any) -> None:
        worker_group.execute(_ask_on_sigterm)

    def before_worker_shutdown(self) -> None:
        _dismissed.set()


def _ask_on_sigterm() -> None:
    def handle(signum: int, frame: object) -> None:
        # At the end of a drain Ray ends the node's workers so; the run goes on without them.
        if not _dismissed.is_set() and draining() is None:
            where = f"rank {ray.train.get_context().get_world_rank()} on {socket.gethostname()}"
            threading.Thread(target=ask_to_stop, args=(f"SIGTERM to {where}",), daemon=True).start()

    signal.signal(signal.SIGTERM, handle)


def draining() -> str | None:
    """Which of the run's nodes are about to be taken away, as this worker has been told, or None."""
    # ray.train.get_preemption_info would have all workers call one actor at each look.
    info = get_train_context().preemption_context.preemption_info
    if info is None:
        return None
    left = f", {info.deadline_ms / 1000 - time.time():.0f} s left" if info.deadline_ms else ""
    return (
        f"node(s) {', '.join(name[:8] for name in info.preempted_node_ids)} with rank(s) {info.preempted_ranks}{left}"
    )


class Beat:
    """The workers' exchange of what only some know: at most once a second, and the same answer on all.

    Worker 0 decides by its clock and by what `news` tells it. The exchange is one all-reduce of 4 + workers numbers.

    Args:
        worker: who this is.
        checkpoint_seconds: from one checkpoint to the next; None for no checkpoints by time.
        news: on worker 0, why to stop, and which nodes are draining; None for neither.
        say: tells a person.
        clock: seconds; a parameter for tests.
    """

    def __init__(
        self,
        worker: Worker,
        checkpoint_seconds: float | None,
        news: Callable[[], tuple[str | None, str | None]],
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._worker = worker
        self._checkpoint_seconds = checkpoint_seconds
        self._news = news
        self._say = say
        self._clock = clock
        self._written = self._last = clock()
        self._wait, self._steps, self._own = 1, 0, 0.0
        self._announced: str | None = None
        self._slow = 0

    def checkpointed(self) -> None:
        """A checkpoint was just written, for whatever reason."""
        self._written = self._clock()

    def after_step(self, own_seconds: float) -> Due:
        """What is due after a step of which this worker took `own_seconds` before it waited for others."""
        self._steps += 1
        self._own += own_seconds
        if self._steps < self._wait:
            return Due.NOTHING
        mine = torch.zeros(4 + self._worker.world, dtype=torch.float64)
        if self._worker.rank == 0:
            mine[:4] = torch.tensor(self._decide())
        mine[4 + self._worker.rank] = self._own / self._steps
        mine = mine.to(self._worker.device)
        if self._worker.world > 1:
            distributed.all_reduce(mine)
        stop, drain, due, wait, *own = mine.tolist()
        self._tell_if_slow(own)
        self._wait, self._steps, self._own = int(wait), 0, 0.0
        if stop:
            return Due.STOP
        return Due.CHECKPOINT if drain or due else Due.NOTHING

    def _decide(self) -> tuple[float, float, float, float]:
        """Worker 0's word: stop, checkpoint for a drain, checkpoint by the clock, steps until the next exchange."""
        now = self._clock()
        step_seconds = (now - self._last) / self._steps
        self._last = now
        stop, drain = self._news()
        # A drain that is known already has had its checkpoint.
        new_drain = drain is not None and self._announced is None
        self._announced = drain
        if stop is not None:
            self._say(f"{stop}: writing a checkpoint, then leaving")
        elif new_drain:
            self._say(f"draining: {drain}; writing a checkpoint, then going on until the node is taken")
        due = self._checkpoint_seconds is not None and now - self._written >= self._checkpoint_seconds
        steps = max(1, min(1000, int(BEAT_SECONDS / step_seconds))) if step_seconds > 0 else 1
        return float(stop is not None), float(new_drain), float(due), float(steps)

    def _tell_if_slow(self, own: list[float]) -> None:
        """Says once that this worker is the one for whom the others wait, and again after it was not."""
        if len(own) < 2:
            return
        mine = own.pop(self._worker.rank)
        others = statistics.median(own)
        self._slow = self._slow + 1 if mine > SLOW * others and mine - others > 0.01 else 0
        if self._slow == SLOW_EXCHANGES:
            self._say(
                f"rank {self._worker.rank} on {socket.gethostname()} is slow: {mine:.2f} s a step for its data and "
                f"forward pass, the others {others:.2f} s; all wait for it"
            )


class Lookout:
    """Worker 0's thread that asks the cluster once a second whether to stop."""

    def __init__(self) -> None:
        self._stop: str | None = None
        threading.Thread(target=self._look, daemon=True).start()

    def news(self) -> tuple[str | None, str | None]:
        """Why to stop, and which nodes are draining."""
        return self._stop, draining()

    def _look(self) -> None:
        while self._stop is None:
            self._stop = asked_to_stop()
            time.sleep(LOOK_SECONDS)
