"""Commands as tests run them: those below one, as Linux's /proc lists them, what environment to give, and those that
need no process of their own.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

JOBS = Path(__file__).resolve().parents[1] / "jobs"
LISTEN = "0A"  # The state in /proc/net/tcp.
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


def listening(session: int) -> list[str]:
    """The local addresses, in the kernel's hex, at which the processes of a session listen."""
    inodes = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(process.name)) == session:
                inodes |= set(re.findall(r"socket:\[(\d+)\]", " ".join(os.readlink(f) for f in process.glob("fd/*"))))
        except (ProcessLookupError, FileNotFoundError):
            continue  # It ended while we looked.
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN and fields[9] in inodes:
                found.append(fields[1].partition(":")[0])
    return found


def outside_clusters() -> dict[str, str]:
    """This process's environment, less the cluster it may belong to: for commands that start a Ray of their own."""
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


def run_here(job: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs jobs/JOB.py as `python` would, but in this process, where its imports have been paid for.

    For commands that end before they start Ray: whose workers could not import what is defined in `__main__`.

    Args:
        job: a command's name, or the path of any other program.
    """
    command = [str(JOBS / f"{job}.py") if job.isidentifier() else job, *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", command),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        runpy.run_path(command[0], run_name="__main__")
    status = ended.value.code
    assert isinstance(status, int)
    return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())


def refusal(job: str, *arguments: object) -> str:
    """The one line that a command which fails leaves on stderr."""
    done = run_here(job, *arguments)
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line
