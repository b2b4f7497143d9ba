"""Processes of commands that start Ray: those below one, as Linux's /proc lists them, and what environment to give."""

from __future__ import annotations

import os
from pathlib import Path

BUILDING = "ray::build_shard"  # What Ray calls a worker while it builds a shard.


def below(pid: int) -> dict[int, str]:
    """The command line of each process that `pid` started, and of those that these started, by its number."""
    lines, children = {}, dict[int, list[int]]()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # The second field, the program's name in brackets, may hold spaces.
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
        # It has ended since.
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            lines[int(folder.name)] = line
            children.setdefault(int(parent), []).append(int(folder.name))
    found: dict[int, str] = {}
    waiting = [pid]
    while waiting:
        for child in children.get(waiting.pop(), []):
            found[child] = lines[child]
            waiting.append(child)
    return found


def builders(pid: int) -> list[int]:
    """The workers below a process that build a shard now, in the order of their numbers."""
    return sorted(child for child, line in below(pid).items() if line.startswith(BUILDING))


def outside_clusters() -> dict[str, str]:
    """This process's environment, less the cluster it may belong to: for commands that start a Ray of their own."""
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
