"""Processes that meet as the ranks of one gloo group, without Ray."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import distributed, multiprocessing


def run_ranks(
    world: int, folder: Path, function: Callable[..., None], *arguments: Any, timeout: timedelta | None = None
) -> None:
    """Runs `function(rank, world, *arguments)` in each of `world` processes, to the end of all.

    Args:
        folder: where they find each other; used once.
        function: of a module, as it is found by its name.
        timeout: of each collective operation; None for torch's own.

    Raises:
        torch.multiprocessing.ProcessRaisedException: with the traceback of one that fails.
    """
    # Forked from a process that has imported torch once, for all tests.
    multiprocessing.set_forkserver_preload([__name__, "tests.model.test_training"])
    given = (world, str(folder / "rendezvous"), timeout, function, arguments)
    multiprocessing.start_processes(_rank, given, nprocs=world, start_method="forkserver")


def _rank(
    rank: int,
    world: int,
    rendezvous: str,
    timeout: timedelta | None,
    function: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    where = f"file://{rendezvous}"
    distributed.init_process_group("gloo", init_method=where, timeout=timeout, rank=rank, world_size=world)
    function(rank, world, *arguments)
    distributed.destroy_process_group()
    sys.stdout.flush()
    # Not by Python's own end: DistributedDataParallel never lets go of its group, and the group's threads now and then
    # abort a process whose interpreter is being taken down around them.
    os._exit(0)
