"""Retries reads and writes of remote storage, with growing waits, a limit, and a line for each.

pyarrow's S3 client repeats a request that was reset, refused with 503 or cut short by itself, for some six seconds (as
measured with pyarrow 26): what comes here has outlived that, so the waits are of the length of an outage.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

ATTEMPTS = 6
FIRST_WAIT_S = 1.0  # Doubled with each attempt: 31 s in all
Result = TypeVar("Result")
Report = Callable[[str], None]


class SourceReadError(OSError):
    """A source that could not be read, or a store written, or not rightly, and may be tried again."""


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Makes any failure to read a source (or write a store) within it a SourceReadError; that there is no such file
    stays what it is."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise SourceReadError(str(error)) from error


class Retry:
    """Makes attempts for several threads.

    Args:
        report: told of each attempt that failed.
        done: what cannot be done to a thing in the end, for people.
    """

    def __init__(self, report: Report, done: str = "read") -> None:
        self._report = report
        self._done = done
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Lets nobody wait or try again: who does so now fails with the error they have."""
        self._stopped.set()

    def __call__(self, action: Callable[[], Result], what: str) -> Result:
        """The action's result.

        Args:
            action: what to do, raising SourceReadError where another attempt may help.
            what: a name for people.

        Raises:
            SourceReadError: the last attempt's, with their number.
        """
        for attempt in range(1, ATTEMPTS):
            try:
                return action()
            except SourceReadError as error:
                # Many nodes that failed together shall not come back together.
                wait = FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
                self._report(f"{what}: attempt {attempt} of {ATTEMPTS} failed ({error}); next in {wait:.1f} s")
                if self._stopped.wait(wait):
                    raise
        try:
            return action()
        except SourceReadError as error:
            raise SourceReadError(f"{what} cannot be {self._done} in {ATTEMPTS} attempts: {error}") from error
