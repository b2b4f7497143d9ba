"""The device of a command that runs in one process."""

from __future__ import annotations

import torch


def choose_device(gpu: bool) -> torch.device:
    """The first GPU, or the CPU.

    Raises:
        ValueError: if a GPU is asked for and torch sees none.
    """
    if not gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--gpu was asked for, but torch sees no GPU here: use --no-gpu, or a machine with one")
    return torch.device("cuda", 0)
