"""Gradients in buckets that stay as they are, and a host that does not run ahead of its GPU."""

from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from model.parallel import STEPS_AHEAD, InFlightStepLimit, data_parallel, no_sync
from tests.ranks import run_ranks

FEATURES = 300  # Its weights are half a megabyte, which torch would put into one bucket first and two later.


def pieces(rank: int, world: int, folder: Path) -> None:
    """Notes the sizes in which the gradients are summed, in each of three steps."""
    torch.manual_seed(0)
    network = data_parallel(nn.Sequential(*(nn.Linear(FEATURES, FEATURES, bias=False) for _ in range(8))), world)
    assert isinstance(network, DistributedDataParallel)
    sizes: list[int] = []

    def hook(group: object, bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sizes.append(bucket.buffer().numel())
        work = distributed.all_reduce(bucket.buffer().div_(world), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    network.register_comm_hook(None, hook)
    for _ in range(3):
        with no_sync(network):
            network(torch.randn(2, FEATURES)).sum().backward()
        network(torch.randn(2, FEATURES)).sum().backward()
    if rank == 0:
        (folder / "sizes").write_text(" ".join(map(str, sizes)))


def test_the_first_step_sums_the_same_pieces_as_all_others(tmp_path: Path) -> None:
    run_ranks(2, tmp_path, pieces, tmp_path)
    sizes = (tmp_path / "sizes").read_text().split()
    third = len(sizes) // 3
    assert sizes[:third] == sizes[third : 2 * third] == sizes[2 * third :]
    assert third > 1
    assert sum(map(int, sizes[:third])) == 8 * FEATURES**2


def test_one_worker_is_the_network_itself() -> None:
    network = nn.Linear(2, 2)
    assert data_parallel(network, 1) is network


def test_no_more_than_two_steps_are_queued_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    queued: list[object] = []

    class Event:
        def __init__(self) -> None:
            queued.append(self)

        def synchronize(self) -> None:
            queued.remove(self)

    class Stream:
        def record_event(self) -> Event:
            return Event()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream())
    leash, most = InFlightStepLimit(torch.device("cuda", 0)), []
    for _ in range(5):
        leash.after_step()
        most.append(len(queued))
    assert most == [1, STEPS_AHEAD, STEPS_AHEAD, STEPS_AHEAD, STEPS_AHEAD]
