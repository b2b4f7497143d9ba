"""The nodes of the Ray cluster, and calls that reach each of them once and come back in time."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ANSWER_SECONDS = 60.0  # A worker process starts and imports its modules in about five; a busy machine takes longer.


@dataclasses.dataclass(frozen=True)
class Node:
    """A node that Ray calls alive."""

    id: str
    address: str
    host: str
    """Its host name."""
    gpus: int
    """How many GPUs Ray was told that it has."""
    cpus: int
    """How many cores Ray was told that it has."""

    def __str__(self) -> str:
        return self.address


@dataclasses.dataclass(frozen=True)
class NoAnswer:
    """What came instead of a result: the call failed, or took too long."""

    why: str


def alive_nodes() -> list[Node]:
    """All nodes that Ray calls alive, by address."""
    nodes = [
        Node(
            row["NodeID"],
            row["NodeManagerAddress"],
            row["NodeManagerHostname"],
            int(row["Resources"].get("GPU", 0)),
            int(row["Resources"].get("CPU", 0)),
        )
        for row in ray.nodes()
        if row["Alive"]
    ]
    return sorted(nodes, key=lambda node: [int(part) if part.isdigit() else 0 for part in node.address.split(".")])


def on(node: Node) -> dict[str, Any]:
    """Ray's options for what shall run on one node and nowhere else, whatever is reserved there."""
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node.id, soft=False)}


def collect(calls: Mapping[Any, ray.ObjectRef], seconds: float = ANSWER_SECONDS) -> dict[Any, Any]:
    """The results of calls under way, by their keys; NoAnswer where one failed or is not back in time."""
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
            answers[key] = NoAnswer(f"{type(error.cause).__name__}: {error.cause}")
        except ray.exceptions.RayError as error:
            answers[key] = NoAnswer(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return answers


def blind_nodes(folder: str, marker: str | None = None) -> list[Node]:
    """The nodes that do not see this machine's folder at the same path, as a shared mount would show it.

    Args:
        folder: an absolute path.
        marker: a file in it whose contents tell the folder; None to write one here, look for it, and remove it.

    Raises:
        OSError: if the folder cannot be made, written or read here.
    """
    written = None
    if marker is None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        marker = f".seen-by-all-{uuid.uuid4().hex}"
        written = Path(folder) / marker
        written.write_text(marker)
    try:
        path = os.path.join(folder, marker)
        wanted = _contents_digest(path)
        look = ray.remote(_contents_digest)
        seen = collect({node: look.options(**on(node), max_retries=0).remote(path) for node in alive_nodes()})
    finally:
        if written is not None:
            written.unlink(missing_ok=True)
    return [node for node, digest in seen.items() if digest != wanted]


def _contents_digest(path: str) -> str:
    # Listing first asks a network file system for news; a look at one name may be answered from its cache.
    os.listdir(os.path.dirname(path))
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def refuse_unshared(option: str, folder: str, cure: str, marker: str | None = None) -> None:
    """Refuses a local folder that some node of the cluster does not see.

    Args:
        option: the command line's, as --storage.
        folder: an absolute local path.
        cure: what to do instead, a clause.
        marker: as for blind_nodes.

    Raises:
        ValueError: naming the nodes.
        OSError: if the folder cannot be written here.
    """
    blind = blind_nodes(folder, marker)
    if blind:
        names = ", ".join(map(str, blind[:5])) + (f" and {len(blind) - 5} more" if len(blind) > 5 else "")
        raise ValueError(
            f"{option} {folder} is a folder of {socket.gethostname()} that {len(blind)} node(s) of the cluster do not "
            f"see ({names}): {cure}"
        )
