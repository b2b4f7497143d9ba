"""Programs that do the same thing in different ways, timed turn and turn about, each in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence

Rates = dict[str, dict[int, float]]
"""Images/s by contender and number of cores."""


def run_pinned(name: str, arguments: Sequence[str], cores: int, time_out_s: float, **environment: str) -> list[str]:
    """Runs `python ARGUMENTS` pinned to so many cores; the lines it printed.

    Raises:
        ValueError: if it fails or does not end.
    """
    allowed = ",".join(map(str, sorted(os.sched_getaffinity(0))[:cores]))
    process = subprocess.Popen(
        ["taskset", "-c", allowed, sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        start_new_session=True,
    )
    try:
        printed, errors = process.communicate(timeout=time_out_s)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{name} did not end within {time_out_s:g} s") from None
    finally:
        # Its worker processes too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise ValueError(f"{name} failed: {(errors.strip().splitlines() or ['nothing said'])[-1]}")
    return printed.splitlines()


def check_cores(cores: Sequence[int]) -> None:
    """Raises ValueError if this process may not use so many."""
    if len(os.sched_getaffinity(0)) < max(cores):
        raise ValueError(f"--cores {max(cores)}: this process may use {len(os.sched_getaffinity(0))}")


def check_least(config: object, *names: str, least: float = 1) -> None:
    """Raises ValueError for a setting, or one of several of its values, that is less, and where there is no value."""
    for name in names:
        given = getattr(config, name)
        values = given if isinstance(given, tuple) else (given,)
        if not values or not min(values) >= least:
            shown = " ".join(map(str, values)) or "empty"
            raise ValueError(f"--{name.replace('_', '-')} is {shown}; it must be at least {least:,}")


def present(names: Sequence[str], installed: Callable[[str], bool]) -> list[str]:
    """Those whose packages are installed; the others are printed."""
    found = [name for name in names if installed(name)]
    if missing := [name for name in names if name not in found]:
        print(f"not installed: {', '.join(missing)}", flush=True)
    return found


def take_turns(names: Sequence[str], cores: Sequence[int], rounds: int, rate: Callable[[str, int], float]) -> Rates:
    """The median rate of each contender on each number of cores; where one fails it is left out and named.

    Args:
        rate: measures a contender once, in images/s, or raises ValueError.
    """
    found: dict[str, dict[int, list[float]]] = {name: {c: [] for c in cores} for name in names}
    for number in range(rounds):
        for name, by in found.items():
            # One after the other, so that what the last core adds is seen at one speed of the machine.
            for c in list(by):
                try:
                    by[c].append(rate(name, c))
                except ValueError as error:
                    print(f"left out on {c} core(s): {error}", flush=True)
                    del by[c]
                    continue
                print(f"round {number + 1}, {c} core(s), {name}: {by[c][-1]:,.1f} images/s", flush=True)
    return {name: {c: statistics.median(values) for c, values in by.items()} for name, by in found.items()}


def table(rates: Rates, cores: Sequence[int], what: str, limit: str, limit_name: str) -> list[str]:
    """Markdown: images/s and the ratio to the limit, for each number of cores, and what the last core adds.

    Args:
        what: the contenders' kind, as a heading.
        limit: the contender that the ratios are to.
        limit_name: what the heading calls it.
    """
    rows = [
        f"| {what} | " + " | ".join(f"{c} core(s): images/s | of the {limit_name}" for c in cores) + " | more cores |"
    ]
    rows.append("| --- " * (2 * len(cores) + 2) + "|")
    for name, by in rates.items():
        cells = []
        for c in cores:
            mine, most = by.get(c), rates.get(limit, {}).get(c)
            cells += [f"{mine:,.0f}" if mine else "", f"{mine / most:.2f}" if mine and most else ""]
        first, last = by.get(cores[0]), by.get(cores[-1])
        rows.append(f"| {name} | {' | '.join(cells)} | {f'{last / first:.2f} x' if first and last else ''} |")
    return rows
