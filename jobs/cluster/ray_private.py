"""All uses of Ray's private names, each with its reason. tests/cluster/test_ray_private.py fails when Ray changes one.

The imports of Ray Train wait for their use: they take seconds, and the jobs that only run tasks need none.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

from ray._private import ray_constants, services


def preemption_info() -> Any:
    """This worker's `ray.train.PreemptionInfo`, or None.

    `ray.train.get_preemption_info` is a barrier of all ranks. A signal handler and rank 0's poller cannot call it.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info


def auto_address() -> str:
    """HOST:PORT of the Ray that RAY_ADDRESS=auto means: the last one that `ray start` started here.

    ray.init would look for a dead one for minutes, and has no time limit.

    Raises:
        ConnectionError: if none was started.
    """
    found: str = services.get_ray_address_from_environment("auto", None)
    return found


@contextlib.contextmanager
def local_start() -> Iterator[None]:
    """While it lasts, Ray starts on loopback only, and each of its processes in a process group of its own.

    Ray reads the switch's environment variable at import, which is too early. ray.init has no option for a process
    group, and a SIGTERM to this process's group, as timeout(1) sends it, would end Ray before the last checkpoint.
    `ray start` has both, but its Ray outlives a killed driver, and every bare ray.init on the machine would join it.
    """
    popen = services.ConsolePopen
    ray_constants.ENABLE_RAY_CLUSTER = False
    services.ConsolePopen = functools.partial(popen, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = popen


class TrainerHooks:
    """To go before TorchTrainer: leaves Ctrl-C to the caller, and a local Ray without a placement-group cleaner."""

    def _register_sigint_handler(self, controller: object) -> None:
        # Ray's handler aborts without a checkpoint. It is not installed if `fit` runs in another thread, but then a
        # second Ctrl-C would shut Ray down under that thread.
        pass

    def _create_default_callbacks(self) -> list[Any]:
        # The cleaner asks a dashboard, which a local Ray has not. It would ask another Ray's on this machine, which
        # does not know the run, and free the run's placement group.
        from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        if os.environ.get("RAY_ADDRESS"):
            return callbacks
        return [one for one in callbacks if not isinstance(one, PlacementGroupCleanerCallback)]
