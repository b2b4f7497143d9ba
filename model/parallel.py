"""What keeps several workers, and a host and its GPU, in step."""

from __future__ import annotations

import collections
import contextlib
import warnings

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

STEPS_AHEAD = 2  # That a GPU has queued, so that it never waits for the host; each holds a batch in its memory.


def data_parallel(network: nn.Module, world: int) -> nn.Module:
    """The network, whose gradients are averaged over `world` workers as they arise in its backward pass."""
    if world == 1:
        return network
    # Else torch would cut the gradients into buckets anew after the first step. In which order a bucket is summed
    # depends on where it begins, so a resumed run, whose first step comes later, would end with other weights.
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    return DistributedDataParallel(
        network, gradient_as_bucket_view=True, forward_sync_buffers=False, find_unused_parameters=True
    )


def no_sync(network: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Within it, gradients add up on each worker and are not averaged yet."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else contextlib.nullcontext()


class InFlightStepLimit:
    """Keeps the host from queueing steps on a GPU without end; on a CPU, where nothing is queued, it does nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._queued: collections.deque[torch.cuda.Event] = collections.deque()

    def after_step(self) -> None:
        """Waits until no more than STEPS_AHEAD steps are under way."""
        if self._device.type == "cuda":
            self._queued.append(torch.cuda.current_stream(self._device).record_event())
            if len(self._queued) > STEPS_AHEAD:
                self._queued.popleft().synchronize()
