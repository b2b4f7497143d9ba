"""What Ray Train's controller does when a worker fails: reports it, and ends a run that another start cannot help."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import socket
from collections.abc import Iterator

from ray.train import ControllerError, UserCallback

from jobs.training.run_state import CheckpointError
from jobs.training.run_storage import LocalDiskError, StorageError
from pipeline.dataset.info import DatasetError

PERMANENT = (CheckpointError, DatasetError, LocalDiskError, StorageError)
"""Errors that say what a person must repair: to train the same steps again would meet them again."""


# Gloo's first one and those after it, and NCCL's: torch has no type of its own for it.
_TIMED_OUT = re.compile("Timed out waiting|Application timeout caused pair closure|collective operation timeout")


class CollectiveTimeoutError(RuntimeError):
    """A collective operation that took longer than --collective-seconds."""


@contextlib.contextmanager
def named_timeouts(seconds: int) -> Iterator[None]:
    """Makes the error of a collective operation that took longer than `seconds` a CollectiveTimeoutError."""
    try:
        yield
    except RuntimeError as error:
        if not _TIMED_OUT.search(str(error)):
            raise
        raise CollectiveTimeoutError(
            f"{socket.gethostname()} waited {seconds} s for the other workers: look for one that hangs, and at the "
            f"network between the nodes; --collective-seconds gives more time"
        ) from None


@dataclasses.dataclass
class FailureReporter(UserCallback):
    """Reports failures, and ends a run whose data, checkpoints, storage or disk fail."""

    max_failures: int
    failures: int = 0
    preempted: str = ""

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if isinstance(error, PERMANENT):
                # Ray Train does not retry a controller's error, and ends the workers that wait for the failed one.
                raise ControllerError(error)
        lost = "; ".join(f"rank {rank}: {_first_line(error)}" for rank, error in sorted(worker_exceptions.items()))
        if any(getattr(_cause(error), "preempted", False) for error in worker_exceptions.values()):
            # Ray Train does not count these as failures, and repeats them until the node is gone.
            if lost != self.preempted:
                print(f"a node was taken: {lost}; starting again from the last checkpoint", flush=True)
            self.preempted = lost
            return
        self.failures += 1
        then = "starting again from the last checkpoint" if self.failures <= self.max_failures else "giving up"
        print(f"failure {self.failures} of at most {self.max_failures + 1}: {lost}; {then}", flush=True)


def _cause(error: BaseException) -> BaseException:
    """The error of Ray Train's health check, or the worker's own."""
    return getattr(error, "health_check_failure", None) or error


def _first_line(error: BaseException) -> str:
    cause = _cause(error)
    lines = str(cause).strip().splitlines() or [""]
    return f"{type(cause).__name__}: {' '.join(lines[0].split())}"
