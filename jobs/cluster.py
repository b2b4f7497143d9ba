"""Reaching Ray: the cluster that RAY_ADDRESS names, or one started here for this command alone."""

from __future__ import annotations

import logging
import os

import ray


def connect(cpus: int | None = None) -> None:
    """Joins the cluster that RAY_ADDRESS names (as `ray job submit` sets it), else starts Ray on this machine.

    Args:
        cpus: what a locally started Ray shall offer; None for all of the machine's.
    """
    if "RAY_ADDRESS" in os.environ:
        ray.init(logging_level=logging.WARNING)
    else:
        # The dashboard, on loopback, serves the state that Ray Train's own helpers ask for.
        # "local", because a bare init would join any Ray that happens to run on this machine.
        ray.init("local", num_cpus=cpus, logging_level=logging.WARNING)
