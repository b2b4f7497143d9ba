"""The device of a command that runs in one process, and the processor's name."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch


def choose_device(gpus: bool | None) -> torch.device:
    """The first GPU, or the CPU; for None, the GPU if torch sees one.

    Raises:
        ValueError: if a GPU is asked for and torch sees none.
    """
    if gpus is False or (gpus is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--gpus was given, but torch sees no GPU here: leave it out, or use a machine with one")
    return torch.device("cuda", 0)


def processor() -> str:
    """What the processor calls itself: Linux says so in a file, and `platform` seldom knows."""
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
    except FileNotFoundError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
