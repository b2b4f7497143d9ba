"""Reaching Ray: the cluster that RAY_ADDRESS names, or one started here for this command alone."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import ray


@contextlib.contextmanager
def connected(cpus: int | None = None, **options: Any) -> Iterator[None]:
    """Joins the cluster that RAY_ADDRESS names (as `ray job submit` sets it), else starts Ray on this machine.

    Leaves the one, or stops the other, at the end.

    Args:
        cpus: what a locally started Ray shall offer; None for all of the machine's.
        options: more of ray.init's, for either.
    """
    options = {"logging_level": logging.WARNING, **options}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**options)
    else:
        # "local", because a bare init would join any Ray that happens to run on this machine.
        ray.init("local", num_cpus=cpus, **options)
    try:
        yield
    finally:
        ray.shutdown()
