"""Gradients and statistics averaged over workers, and a host that does not run ahead of its GPU."""

from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.parallel import STEPS_AHEAD, InFlightStepLimit, data_parallel, no_sync
from model.recipe import Recipe
from model.training import Trainer, Worker
from tests.ranks import run_ranks

WORLD = 3  # Of two workers' values, the sum does not depend on their order.
FEATURES = 300
ROWS = torch.arange(30.0).reshape(10, 3) ** 2  # To normalize: four, three and three of them on the workers.


class Rows(NamedTuple):
    images: Tensor
    labels: Tensor


def averaged(
    network: DistributedDataParallel, own: nn.Module, images: torch.Tensor, steps: int
) -> list[list[torch.Tensor]]:
    """The gradients that the workers exchanged in each of so many equal steps of two micro-batches."""
    found = []
    for _ in range(steps):
        own.zero_grad()
        with no_sync(network):
            network(images[:2]).square().sum().backward()
        network(images[2:]).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in own.parameters() if parameter.grad is not None])
    return found


def alone(own: nn.Module, images: torch.Tensor) -> list[torch.Tensor | None]:
    """This worker's own gradients."""
    own.zero_grad()
    own(images).square().sum().backward()
    return [parameter.grad for parameter in own.parameters()]


def steps(rank: int, world: int, folder: Path) -> None:
    """Saves the averaged gradients of three equal steps, this worker's own, and the statistics of a fourth's rows."""
    torch.manual_seed(rank)
    own = nn.Sequential(*(nn.Linear(FEATURES, FEATURES) for _ in range(8)))
    images = torch.randn(4, FEATURES)
    # DDP gives all the weights of rank 0.
    network = data_parallel(own, world)
    assert isinstance(network, DistributedDataParallel)
    torch.save([averaged(network, own, images, 3), alone(own, images)], folder / f"rank{rank}")

    normalized = nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.Linear(3, 2))
    trainer = Trainer(normalized, Recipe(batch_size=len(ROWS)), Worker(rank, world, torch.device("cpu")))
    rows = ROWS.tensor_split(WORLD)[rank]
    trainer.step([Rows(rows, torch.zeros(len(rows), dtype=torch.int64))])
    trainer._share_buffers()
    torch.save(dict(normalized.named_buffers()), folder / f"statistics{rank}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each worker has saved."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(WORLD, folder, steps, folder)
    return folder


def test_batch_normalization_keeps_the_mean_of_each_workers_own_statistics(folder: Path) -> None:
    # torch's momentum is a tenth.
    parts = np.array_split(ROWS.double().numpy(), WORLD)
    means, variances = [part.mean(axis=0) for part in parts], [part.var(axis=0, ddof=1) for part in parts]
    for rank in range(WORLD):
        kept = torch.load(folder / f"statistics{rank}", weights_only=True)
        np.testing.assert_allclose(kept["0.running_mean"], 0.1 * np.mean(means, axis=0), rtol=1e-6)
        np.testing.assert_allclose(kept["0.running_var"], 0.9 + 0.1 * np.mean(variances, axis=0), rtol=1e-6)


def test_the_first_step_averages_as_all_others_do_to_the_bit(folder: Path) -> None:
    """A resumed run's first step is another run's later one."""
    ranks = [torch.load(folder / f"rank{rank}", weights_only=True) for rank in range(WORLD)]
    alone = [torch.stack(each).double().mean(dim=0) for each in zip(*(own for _, own in ranks), strict=True)]
    for first, *others in (found for found, _ in ranks):
        for gradient, expected in zip(first, alone, strict=True):
            torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        for later in others:
            assert all(torch.equal(one, two) for one, two in zip(first, later, strict=True))


def compressed(rank: int, world: int, folder: Path) -> None:
    """Saves the averaged gradients of two equal steps, and this worker's own; the bytes of each exchange."""
    torch.manual_seed(rank)
    own = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.ReLU(), nn.Linear(FEATURES, 7))
    images = torch.randn(4, FEATURES)
    network = data_parallel(own, world, "bfloat16")
    assert isinstance(network, DistributedDataParallel)
    sent = []
    all_reduce = torch.distributed.all_reduce

    def count(tensor: torch.Tensor, async_op: bool = False) -> object:
        sent.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, async_op=async_op)

    with mock.patch.object(torch.distributed, "all_reduce", count):
        found = averaged(network, own, images, 2)
    torch.save([found, alone(own, images), sent], folder / f"rank{rank}")


def test_compressed_gradients_are_those_of_the_formula_in_half_the_bytes(tmp_path: Path) -> None:
    """Each worker's gradient rounded to bfloat16, halved, added up and rounded again."""
    run_ranks(2, tmp_path, compressed, tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in range(2)]
    sizes = [gradient.numel() for gradient in ranks[0][1]]
    for found, _, sent in ranks:
        assert sorted(sent) == sorted(2 * [2 * size for size in sizes])
        for first, second in zip(*found, strict=True):
            assert torch.equal(first, second)
    for number in range(len(sizes)):
        one, other = (found[0][number] for found, _, _ in ranks)
        assert torch.equal(one, other)
        assert torch.equal(one, one.bfloat16().float())
        rounded = [own[number].bfloat16().double() / 2 for _, own, _ in ranks]
        # The own gradients are added up in another order than with micro-batches: some may round to a neighbor.
        expected = (rounded[0] + rounded[1]).bfloat16().double()
        step = 2.0**-7 * sum(value.abs() for value in rounded)
        assert bool(((one.double() - expected).abs() <= step).all())
        assert float((one.double() == expected).double().mean()) > 0.95


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
    limit, most = InFlightStepLimit(torch.device("cuda", 0)), []
    for _ in range(5):
        limit.after_step()
        most.append(len(queued))
    assert most == [1, STEPS_AHEAD, STEPS_AHEAD, STEPS_AHEAD, STEPS_AHEAD]
