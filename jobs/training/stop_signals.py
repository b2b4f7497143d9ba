"""Stops that are announced: SIGTERM, Ctrl-C or a hangup to the driver, SIGTERM to a worker, and a spot node's drain.

Whoever gets the signal writes the reason to the file STOP in the run's folder. A thread of rank 0 polls it, and rank 0
tells the others after each step and each validation batch (`StopConsensus`), so that all write one checkpoint at the
same place.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator

import ray.train
import torch
from pyarrow import fs
from torch import distributed

from jobs.cli.command import log, one_line
from jobs.cluster.ray_private import preemption_info
from model.training import StepAction, Worker
from pipeline.storage.locations import join, open_location, shown

POLL_SECONDS = 0.5
COMPARE_SECONDS = 1.0  # From one comparison of the ranks' speeds to the next.
AGAIN_SECONDS = 1.0  # A person who insists takes longer than timeout(1), which signals the process and its group.
SLOW = 2.0  # Times the other workers' median
SLOW_COMPARISONS = 3  # In a row, before it is said: any machine stumbles.


def clear_stop_request(run: str) -> None:
    """Before a run's start: an empty file, because a mounted folder may hide a new file for a minute, not its text."""
    request_stop(run, "")


def request_stop(run: str, reason: str) -> None:
    """Stops the run in a folder, a path or URL; a person may do so by `echo WHY > STORAGE/NAME/STOP`."""
    filesystem, path = stop_file(run)
    with filesystem.open_output_stream(path) as stream:
        stream.write(reason.encode())


def insist_on_stop(run: str, reason: str, over: threading.Event) -> None:
    """`request_stop`, tried again until it is done or `over` is set; the first failure is said in one line."""
    said = False
    while not over.is_set():
        try:
            request_stop(run, reason)
            return
        except (OSError, ValueError) as error:
            if not said:
                _say(f"warning: {reason}, but the stop cannot be written to {shown(run)}: {one_line(error)}")
            said = True
        over.wait(POLL_SECONDS)


def _say(line: str) -> None:
    # After a hangup nobody listens any more.
    with contextlib.suppress(OSError):
        log(line)


def stop_file(run: str) -> tuple[fs.FileSystem, str]:
    """Where a run's stop request is written and looked for."""
    return open_location(join(run, "STOP"))


def stop_requested(filesystem: fs.FileSystem, path: str) -> str | None:
    """Why the run with this stop file shall stop, or None.

    Raises:
        OSError: if the file is there and cannot be read.
    """
    try:
        with filesystem.open_input_stream(path) as stream:
            return stream.read().decode("utf-8", "replace").strip() or None
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def signals_stop(run: str) -> Iterator[None]:
    """While it lasts, SIGTERM, SIGINT (Ctrl-C) or SIGHUP to this process, the driver, asks the workers to stop.

    A later one raises KeyboardInterrupt.
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

    def request() -> None:
        # In a thread, because a handler may interrupt the very call to Ray that it would make.
        seen.wait()
        if not over.is_set():
            _say(
                f"{name}: a checkpoint is written after the next step; a second one leaves at once without it, as is "
                "needed where no step comes: while the workers wait for room, or the set is staged"
            )
            insist_on_stop(run, f"{name} to the driver", over)

    threading.Thread(target=request, daemon=True).start()
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
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


_shutting_down = threading.Event()
"""In a worker: Ray Train is about to end this process, for which Ray uses SIGTERM, too."""


def ignore_sigterm() -> None:
    """In a worker, before Ray Train ends it."""
    _shutting_down.set()


def stop_on_sigterm(run: str) -> None:
    """In a worker's main thread: SIGTERM asks all workers to stop, instead of ending this one."""
    where = f"rank {ray.train.get_context().get_world_rank()} on {socket.gethostname()}"

    def handle(signum: int, frame: object) -> None:
        # At the end of a drain Ray ends the node's workers so; the run goes on without them.
        if not _shutting_down.is_set() and draining() is None:
            asked = (run, f"SIGTERM to {where}", _shutting_down)
            threading.Thread(target=insist_on_stop, args=asked, daemon=True).start()

    signal.signal(signal.SIGTERM, handle)


def draining() -> str | None:
    """Which of the run's nodes are about to be taken away, as this worker has been told, or None."""
    info = preemption_info()
    if info is None:
        return None
    left = f", {info.deadline_ms / 1000 - time.time():.0f} s left" if info.deadline_ms else ""
    return (
        f"node(s) {', '.join(name[:8] for name in info.preempted_node_ids)} with rank(s) {info.preempted_ranks}{left}"
    )


class StopConsensus:
    """The ranks' agreement on stops and checkpoints: after each step or validation batch rank 0 sends three numbers to
    the others.

    Not after every few steps: how many of them fit into a second is only known of those that are over.

    Args:
        checkpoint_seconds: from one checkpoint to the next; None for no checkpoints by time.
        news: on rank 0, why to stop, and which nodes are draining; None for neither.
        clock: seconds; a parameter for tests.
    """

    def __init__(
        self,
        worker: Worker,
        checkpoint_seconds: float | None,
        news: Callable[[], tuple[str | None, str | None]],
        log: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._worker = worker
        self._checkpoint_seconds = checkpoint_seconds
        self._news = news
        self._log = log
        self._clock = clock
        self._written = self._compared = clock()
        self._steps, self._own = 0, 0.0
        self._announced: str | None = None
        self._slow = 0

    def checkpointed(self) -> None:
        self._written = self._clock()

    def after_step(self, own_seconds: float) -> StepAction:
        """What to do after a step that took this rank `own_seconds` before it waited for others."""
        self._steps += 1
        self._own += own_seconds
        return self.agree()

    def agree(self) -> StepAction:
        """What is due now: rank 0 decides, and every rank gets the same answer."""
        # On the CPU, whatever trains: to read it from a GPU would wait for the steps that are queued there.
        decision = torch.tensor(self._decide() if self._worker.rank == 0 else (False,) * 3)
        if self._worker.world > 1:
            distributed.broadcast(decision, src=0)
        stop, checkpoint, compare = decision.tolist()
        if compare:
            self._compare()
        if stop:
            return StepAction.STOP
        return StepAction.CHECKPOINT if checkpoint else StepAction.NOTHING

    def _decide(self) -> tuple[bool, bool, bool]:
        """Whether to stop, to write a checkpoint, to compare speeds."""
        now = self._clock()
        stop, drain = self._news()
        # A drain that is known already has had its checkpoint.
        new_drain = drain is not None and self._announced is None
        self._announced = drain
        if stop is not None:
            self._log(f"{stop}: writing a checkpoint, then leaving")
        elif new_drain:
            self._log(f"draining: {drain}; writing a checkpoint, then going on until the node is taken")
        due = self._checkpoint_seconds is not None and now - self._written >= self._checkpoint_seconds
        compare = self._worker.world > 1 and self._steps > 0 and now - self._compared >= COMPARE_SECONDS
        if compare:
            self._compared = now
        return stop is not None, new_drain or due, compare

    def _compare(self) -> None:
        """Prints once that the others wait for this rank, and again after it had caught up."""
        own = torch.zeros(self._worker.world, dtype=torch.float64)
        own[self._worker.rank] = self._own / self._steps
        self._steps, self._own = 0, 0.0
        distributed.all_reduce(own)
        others = own.tolist()
        mine = others.pop(self._worker.rank)
        median = statistics.median(others)
        self._slow = self._slow + 1 if mine > SLOW * median and mine - median > 0.01 else 0
        if self._slow == SLOW_COMPARISONS:
            self._log(
                f"rank {self._worker.rank} on {socket.gethostname()} is slow: {mine:.2f} s a step for its data and "
                f"forward pass, the others {median:.2f} s; all wait for it"
            )


class StopRequestPoller:
    """Rank 0's thread that looks for a stop request twice a second; a failure to look is said once."""

    def __init__(self, run: str, log: Callable[[str], None]) -> None:
        # Once: opening an object store takes requests of its own.
        self._file = stop_file(run)
        self._log = log
        self._stop: str | None = None
        threading.Thread(target=self._poll, daemon=True).start()

    def news(self) -> tuple[str | None, str | None]:
        """Why to stop, and which nodes are draining."""
        return self._stop, draining()

    def _poll(self) -> None:
        failing = False
        while self._stop is None:
            try:
                self._stop = stop_requested(*self._file)
                failing = False
            # Whatever it is: a thread that ends would leave the run deaf to stops.
            except Exception as error:
                if not failing:
                    self._log(f"warning: no stop request can be read, trying on: {one_line(error)}")
                failing = True
            time.sleep(POLL_SECONDS)
