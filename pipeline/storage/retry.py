"""The one retry policy for reads and writes of remote storage: exponential waits with jitter, bounded, each logged.

pyarrow's S3 client by itself repeats a request that was reset, refused with 503 or cut short, for some six seconds (as
measured with pyarrow 26). What comes here has outlived that, or comes from a client that repeats nothing.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

ATTEMPTS = 7
FIRST_WAIT_S = 0.5  # Doubled with each attempt: 31.5 s at most in all
Result = TypeVar("Result")

_log = logging.getLogger(__name__)


class SourceReadError(OSError):
    """A source that could not be read, or a store written, or not rightly, and may be tried again."""


def retry(action: Callable[[], Result], what: str, did: str = "read") -> Result:
    """The action's result.

    Args:
        action: raises SourceReadError where another attempt may help.
        what: a name for people.
        did: what is done to it.

    Raises:
        SourceReadError: the last attempt's, with their number.
    """
    for attempt in range(1, ATTEMPTS):
        try:
            return action()
        except SourceReadError as error:
            # Many nodes that failed together shall not come back together.
            wait = FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
            _log.warning(f"{what}: attempt {attempt} of {ATTEMPTS} failed ({error}); next in {wait:.1f} s")
            time.sleep(wait)
    try:
        return action()
    except SourceReadError as error:
        raise SourceReadError(f"{what} cannot be {did} in {ATTEMPTS} attempts: {error}") from error
