"""What keeps several workers, and a host and its GPU, in step."""

# Without postponed annotations: DDP reads those of its hook.

import collections
import contextlib

import torch
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_wrapper
from torch.nn.parallel import DistributedDataParallel

STEPS_AHEAD = 2  # That a GPU has queued, so that it never waits for the host; each holds a batch in its memory.


def data_parallel(network: nn.Module, world: int, compression: str = "none") -> nn.Module:
    """The network, whose gradients are averaged over `world` workers as they arise in its backward pass.

    Args:
        compression: none, or bfloat16 for what the workers exchange.
    """
    if world == 1:
        return network
    parallel = DistributedDataParallel(network, gradient_as_bucket_view=True, forward_sync_buffers=False)
    parallel.register_comm_hook(
        world, bf16_compress_wrapper(_average_each) if compression == "bfloat16" else _average_each
    )
    return parallel


def _average_each(world: int, bucket: distributed.GradBucket) -> torch.futures.Future[Tensor]:
    """Averages each parameter's gradient by itself.

    In which order the workers' values are added depends on a value's place in what is exchanged. DDP arranges buckets
    anew after its first step, so that a resumed run, whose first step is another's later one, would end with other
    weights.
    """
    gradients = bucket.buffer().div_(world).split([gradient.numel() for gradient in bucket.gradients()])
    done = [distributed.all_reduce(gradient, async_op=True).get_future() for gradient in gradients]
    return torch.futures.collect_all(done).then(lambda _: bucket.buffer())


def no_sync(network: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Within it, gradients add up on each worker and are not averaged yet."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else contextlib.nullcontext()


class SharedStatistics:
    """Gives all workers the mean of their running statistics of batch normalization.

    After each step, not only where they are saved: their last bits would depend on when that was.
    """

    def __init__(self, network: nn.Module, world: int) -> None:
        saved = network.state_dict().keys()
        self._world = world
        self._buffers = [one for name, one in network.named_buffers() if name in saved and one.is_floating_point()]

    @torch.no_grad()
    def after_step(self) -> None:
        if self._world > 1 and self._buffers:
            all_of_them = torch.cat(self._buffers)
            distributed.all_reduce(all_of_them)
            all_of_them /= self._world
            for buffer, mean in zip(self._buffers, all_of_them.split([len(one) for one in self._buffers]), strict=True):
                buffer.copy_(mean)


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
