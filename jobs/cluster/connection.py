"""Reaching Ray: the cluster that RAY_ADDRESS names, or one started here for this command alone."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray
import ray.exceptions

from jobs.cli.cores import cores
from jobs.cluster.ray_private import auto_address, local_start

RETRIES = 3
CONNECT_SECONDS = 10
MAX_TMPDIR = 38  # A socket's path has 107: /ray/session_DATE_TIME_MICROSECONDS_PID/sockets/plasma_store has the rest.

# Ray's own switch: with it, every part of Ray listens on 127.0.0.1 only.
LOOPBACK_SWITCH = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# Gloo would listen at the address of the host's name, NCCL at that of the first network.
LOOPBACK_INTERFACE = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


def on_cluster() -> bool:
    """Whether `connected` joins a cluster, and does not start a Ray that is this command's own."""
    return bool(os.environ.get("RAY_ADDRESS"))


def check_gpus_or_cluster(gpus: int) -> None:
    """Raises ValueError if --gpus was given where there are none and none can come: a cluster may grow."""
    if not gpus and not on_cluster():
        raise ValueError("--gpus was given, and Ray sees no GPU on this machine: leave it out, or look at `nvidia-smi`")


@contextlib.contextmanager
def connected(cpus: int | None = None, **options: Any) -> Iterator[None]:
    """Joins the cluster that RAY_ADDRESS names (as `ray job submit` sets it), else starts Ray on this machine.

    A Ray started here ends with the context. It has no dashboard and listens on loopback only: whoever reaches its
    ports could run code.

    Args:
        cpus: of a Ray started here; None for all that this process may use.
        options: more of ray.init's, for either.

    Raises:
        ConnectionError: if Ray cannot be joined or does not start.
    """
    level = options.pop("logging_level", logging.WARNING)
    # At WARNING, a start says first of all how its tokens are turned off.
    options["logging_level"] = logging.ERROR
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _check_unreachable(address)
    try:
        if address:
            ray.init(**options)
        else:
            # Before the start: what Ray starts inherits them.
            os.environ.update(LOOPBACK_SWITCH | LOOPBACK_INTERFACE)
            # "local", because a bare init would join any Ray that happens to run on this machine.
            # Its dashboard is a dozen more processes and 4 s more to wait for.
            with local_start():
                ray.init("local", num_cpus=cpus or cores(), include_dashboard=False, **options)
    # Ray raises what the failing part of its start leads it to, plain Exception among it.
    except Exception as error:
        what = "Ray does not start here"
        cure = (
            "run it again if this machine was very busy; else see the logs below RAY_TMPDIR (/tmp/ray by default) and "
            "the free space there and in /dev/shm; you must be able to write there and in HOME, and RAY_TMPDIR may "
            f"have at most {MAX_TMPDIR} characters"
        )
        if address:
            what = f"the cluster at RAY_ADDRESS={address} cannot be joined"
            cure = "see `ray status` on that machine, and that both have the same versions of Ray and Python"
        raise ConnectionError(f"{what} ({type(error).__name__}: {' '.join(str(error).split())}): {cure}") from error
    logging.getLogger("ray").setLevel(level)
    try:
        yield
    finally:
        ray.shutdown()


def _check_unreachable(address: str) -> None:
    """Ray itself would try for minutes, and may abort the process.

    Raises:
        ConnectionError: if nothing listens at the address.
    """
    cure = (
        "see `ray status` on the head; run this as a job: ray job submit --working-dir . -- python jobs/..., or unset "
        "RAY_ADDRESS to use this machine"
    )
    found = address
    if address == "auto":
        cure = "start one with `ray start --head`, or unset RAY_ADDRESS to use this machine alone"
        try:
            found = auto_address()
        except ConnectionError as error:
            raise ConnectionError(f"RAY_ADDRESS is auto, and no Ray runs on this machine: {cure}") from error
    host, _, port = found.rpartition(":")
    if not port.isdigit() or "://" in found:
        raise ConnectionError(f"RAY_ADDRESS is {found}, and a driver needs HOST:PORT of Ray itself: {cure}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        where = address if found == address else f"{address}, which is {found},"
        raise ConnectionError(f"no Ray can be reached at RAY_ADDRESS {where} ({error}): {cure}") from error


def in_parallel(
    function: Callable[..., Any], calls: Iterable[tuple[Any, ...]], workers: int | None = None, **resources: float
) -> Iterator[tuple[int, Any]]:
    """`stream` for a plain function. A call whose worker dies, or that raises OSError, is made again, RETRIES times.

    `resources` are a call's num_cpus, 1 by default, and num_gpus.
    """

    def answer(*arguments: Any) -> Iterator[Any]:
        yield function(*arguments[:-1])

    options = {"num_cpus": 1, "max_retries": 0, "num_returns": "streaming", "name": function.__name__, **resources}
    task = ray.remote(answer).options(**options)
    return stream(task, calls, workers, RETRIES + 1, (OSError,))


class LostError(ValueError):
    """A call whose worker died each time it was made."""

    def __init__(self, number: int, attempts: int, reason: str) -> None:
        cure = "look for what ended them, as a lack of memory would, or give fewer --workers"
        super().__init__(f"the workers of task {number} died {attempts} times ({reason}): {cure}")
        self.number, self.attempts, self.reason = number, attempts, reason


def stream(
    task: Any,
    calls: Iterable[tuple[Any, ...]],
    workers: int | None = None,
    attempts: int = 1,
    again: tuple[type[BaseException], ...] = (),
) -> Iterator[tuple[int, Any]]:
    """Runs a generator task once for each tuple of arguments, and yields each call's number and what it yields, as it
    comes.

    No more run, or wait at Ray, than there are workers. A call that is made again yields from its beginning again.

    Args:
        task: a remote function with num_returns="streaming" and max_retries=0, which takes the number of its attempt,
            from 0, behind the arguments of a call.
        workers: how many run at a time; None for one a CPU, counted anew as nodes come and go.
        attempts: how often a call is made whose worker or node dies.
        again: errors of the task's own after which its call is made again, too.

    Raises:
        LostError: if a call's worker or node died at each attempt.
        BaseException: the task's own error, without Ray's wrapping.
    """
    waiting = enumerate(calls)
    running: dict[ray.ObjectRefGenerator, tuple[int, tuple[Any, ...], int]] = {}
    left = True
    while left or running:
        while left and len(running) < (workers or int(ray.cluster_resources().get("CPU", 1))):
            number, arguments = next(waiting, (-1, ()))
            left = number >= 0
            if left:
                running[task.remote(*arguments, 0)] = (number, arguments, 0)
        ready = ray.wait(list(running), num_returns=1)[0] if running else []
        for items in ready:
            number, arguments, attempt = running.pop(items)
            try:
                item = ray.get(next(items))
            except StopIteration:
                continue
            except ray.exceptions.RayError as error:
                own = error.cause if isinstance(error, ray.exceptions.RayTaskError) else None
                if own is not None and not isinstance(own, again):
                    raise own from error
                if attempt + 1 == attempts:
                    raise own or LostError(number, attempts, type(error).__name__) from error
                running[task.remote(*arguments, attempt + 1)] = (number, arguments, attempt + 1)
                continue
            running[items] = (number, arguments, attempt)
            yield number, item
