"""The nodes of the Ray cluster, and calls that reach each of them once and come back in time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.cli.command import one_line

ANSWER_SECONDS = 60.0  # A worker process starts and imports its modules in about five; a busy machine takes longer.


@dataclasses.dataclass(frozen=True)
class Node:
    """A node that Ray calls alive."""

    id: str
    address: str
    gpus: int
    cpus: int
    """As Ray was told."""

    def __str__(self) -> str:
        return self.address


@dataclasses.dataclass(frozen=True)
class NoAnswer:
    """What came instead of a result: the call failed, or took too long."""

    why: str


def alive_nodes() -> list[Node]:
    """All nodes that Ray calls alive, by address."""
    nodes = [
        Node(row["NodeID"], row["NodeManagerAddress"], *(int(row["Resources"].get(kind, 0)) for kind in ("GPU", "CPU")))
        for row in ray.nodes()
        if row["Alive"]
    ]
    return sorted(nodes, key=lambda node: [int(part) if part.isdigit() else 0 for part in node.address.split(".")])


def on_each(
    nodes: Iterable[Node], function: Callable[..., Any], *arguments: object, seconds: float = ANSWER_SECONDS
) -> dict[Node, Any]:
    """Runs a function on each node, whatever is reserved there: its results, as `collect` returns them."""
    task = ray.remote(function)
    calls = {}
    for node in nodes:
        here = NodeAffinitySchedulingStrategy(node.id, soft=False)
        calls[node] = task.options(num_cpus=0, max_retries=0, scheduling_strategy=here).remote(*arguments)
    return collect(calls, seconds)


def collect(calls: Mapping[Any, ray.ObjectRef], seconds: float = ANSWER_SECONDS) -> dict[Any, Any]:
    """The results of running calls, by their keys; NoAnswer where one failed or is not back in time."""
    ready, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=seconds) if calls else ([], [])
    arrived = set(ready)
    answers: dict[Any, Any] = {}
    for key, reference in calls.items():
        if reference not in arrived:
            answers[key] = NoAnswer(f"no answer within {seconds:.0f} s")
            continue
        try:
            answers[key] = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            # Errors that the functions raise on purpose speak for themselves.
            kind = "" if isinstance(error.cause, ValueError | OSError) else f"{type(error.cause).__name__}: "
            answers[key] = NoAnswer(kind + one_line(error.cause))
        except ray.exceptions.RayError as error:
            answers[key] = NoAnswer(f"{type(error).__name__}: {one_line(error)[:200]}")
    return answers
