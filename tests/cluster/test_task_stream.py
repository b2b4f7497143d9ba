"""What `stream` hands to Ray, and when: a stand-in for Ray counts what is in flight at every moment. And no Ray."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray._private import ray_constants, services

from jobs.cluster import connection as cluster


class Items:
    """A task in flight: its answers come when the stand-in says."""

    def __init__(self, ray: StandIn, values: list[int]) -> None:
        self._ray = ray
        self._values = values

    def __next__(self) -> int:
        if self._values:
            return self._values.pop(0)
        self._ray.in_flight.remove(self)
        raise StopIteration


class StandIn:
    """The parts of Ray that `stream` uses, with each task ending in an order drawn by chance."""

    exceptions = cluster.ray.exceptions
    ObjectRefGenerator = Items

    def __init__(self, seed: int, cpus: int) -> None:
        self._chance = random.Random(seed)
        self.cpus = cpus
        self.in_flight: list[Items] = []
        self.most = 0
        self.sent: list[int] = []

    def remote(self, call: int, attempt: int) -> Items:
        assert attempt == 0
        items = Items(self, [10 * call + i for i in range(self._chance.randint(0, 3))])
        self.in_flight.append(items)
        self.sent.append(call)
        self.most = max(self.most, len(self.in_flight))
        return items

    def wait(self, running: list[Items], num_returns: int) -> tuple[list[Items], list[Items]]:
        assert set(running) == set(self.in_flight)
        ready = self._chance.choice(running)
        return [ready], [items for items in running if items is not ready]

    def get(self, item: int) -> int:
        return item

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(self.cpus)}


def tracked(ray: StandIn, count: int, lead: list[int]) -> Iterator[tuple[int]]:
    """Calls that note, each as it is taken, how many are in flight already."""
    for number in range(count):
        lead.append(len(ray.in_flight))
        yield (number,)


@pytest.mark.parametrize("workers", [1, 2, 7])
@pytest.mark.parametrize("seed", range(3))
def test_no_more_are_in_flight_than_workers_and_none_is_taken_early(
    workers: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray, lead = StandIn(seed, cpus=99), list[int]()
    monkeypatch.setattr(cluster, "ray", ray)
    answers: dict[int, list[Any]] = {}
    for number, item in cluster.stream(ray, tracked(ray, 100, lead), workers):
        answers.setdefault(number, []).append(item)
        # Whoever is slow to take answers holds up the calls, too.
        assert len(lead) == len(ray.sent) <= 100
        assert len(ray.in_flight) <= workers
    assert ray.sent == list(range(100))
    assert ray.most == workers
    assert max(lead) < workers
    assert not ray.in_flight
    assert all(items == [10 * number + i for i in range(len(items))] for number, items in answers.items())


def test_without_a_number_there_is_one_a_cpu_as_nodes_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    ray, lead = StandIn(0, cpus=2), list[int]()
    monkeypatch.setattr(cluster, "ray", ray)
    answers = cluster.stream(ray, tracked(ray, 60, lead))
    assert lead == []
    for _ in range(10):
        next(answers)
    assert ray.most == 2
    ray.cpus = 5
    for _ in range(20):
        next(answers)
    assert ray.most == 5
    ray.cpus, before = 1, len(ray.sent)
    rest = list(answers)
    assert rest
    # Those that a lost node leaves over are not replaced before there is room.
    assert max(lead[before + 1 :], default=0) == 0
    assert ray.sent == list(range(60))


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"RAY_ADDRESS": "127.0.0.1:9"}, "no Ray can be reached at RAY_ADDRESS 127.0.0.1:9"),
        ({"RAY_ADDRESS": "http://localhost:8265"}, "ray job submit"),
        ({"RAY_TMPDIR": __file__}, "Ray does not start here .*Not a directory.*: set RAY_TMPDIR to a folder that you"),
        ({"RAY_TMPDIR": f"/tmp/{'x' * 90}"}, "Ray does not start here .*: set RAY_TMPDIR to a path of at most 38"),
    ],
)
def test_a_ray_that_is_not_to_be_had_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], told: str
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # What a start sets goes back to what it was.
    monkeypatch.setattr(os, "environ", {**os.environ, **environment})
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", ray_constants.ENABLE_RAY_CLUSTER)
    with pytest.raises(ConnectionError, match=told), cluster.connected(1):
        pass


def test_an_address_that_an_ended_ray_has_left_is_told_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, "RAY_ADDRESS": "auto", "RAY_TMPDIR": str(tmp_path)})
    # Of another Ray on this machine.
    monkeypatch.setattr(services, "find_gcs_addresses", lambda: set())
    with pytest.raises(ConnectionError, match=r"RAY_ADDRESS is auto, and no Ray runs .*unset RAY_ADDRESS"):
        cluster._check_unreachable("auto")
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:9")
    told = r"no Ray can be reached at RAY_ADDRESS auto, which is 127\.0\.0\.1:9, .*unset RAY_ADDRESS"
    with pytest.raises(ConnectionError, match=told), cluster.connected(1):
        pass


def test_a_home_that_cannot_be_written_is_told_from_a_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray keeps its token in the one, and looks for it only at a process's first start."""
    monkeypatch.setenv("HOME", "/proc/none")
    assert "set HOME to a folder that can be" in cluster._start_cure(PermissionError(13, "no", "/proc/none/.ray"))
    assert "set RAY_TMPDIR to a folder" in cluster._start_cure(PermissionError(13, "no", "/tmp/ray/session"))
    assert "see the logs below RAY_TMPDIR" in cluster._start_cure(RuntimeError("the raylet ended"))
