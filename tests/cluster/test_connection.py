"""What `stream` hands to Ray, and when; a Ray that is not to be had; the interface with a node's address; and a folder
that not all nodes see.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private import ray_constants, services

from jobs import train
from jobs.cli.workers import Workers
from jobs.cluster import connection as cluster
from jobs.cluster.network import GLOO, NCCL, interface_of, use_node_interface
from jobs.cluster.nodes import NoAnswer, Node
from jobs.training.config import TrainConfig


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
    """The parts of Ray that `stream` uses. Tasks end in an order drawn by chance, and what is in flight is counted."""

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


@pytest.mark.parametrize("workers", [1, 2, 7])
@pytest.mark.parametrize("seed", range(3))
def test_no_more_are_in_flight_than_workers(workers: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = StandIn(seed, cpus=99)
    monkeypatch.setattr(cluster, "ray", ray)
    answers: dict[int, list[Any]] = {}
    for number, item in cluster.stream(ray, ((n,) for n in range(100)), workers):
        answers.setdefault(number, []).append(item)
        # Whoever is slow to take answers holds up the calls, too.
        assert len(ray.in_flight) <= workers
    assert ray.sent == list(range(100))
    assert ray.most == workers
    assert not ray.in_flight
    assert all(items == [10 * number + i for i in range(len(items))] for number, items in answers.items())


def test_without_a_number_there_is_one_a_cpu_as_nodes_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = StandIn(0, cpus=2)
    monkeypatch.setattr(cluster, "ray", ray)
    answers = cluster.stream(ray, ((n,) for n in range(60)))
    for cpus in (2, 5):
        ray.cpus = cpus
        for _ in range(20):
            next(answers)
        assert ray.most == cpus
    # Those that a lost node leaves over are not replaced before there is room.
    ray.cpus, before = 1, len(ray.sent)
    for _ in answers:
        assert len(ray.sent) == before or len(ray.in_flight) <= 1
    assert ray.sent == list(range(60))


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"RAY_ADDRESS": "127.0.0.1:9"}, "no Ray can be reached at RAY_ADDRESS 127.0.0.1:9"),
        ({"RAY_ADDRESS": "http://localhost:8265"}, "ray job submit .*, or unset RAY_ADDRESS to use this machine"),
        ({"RAY_TMPDIR": __file__}, "Ray does not start here .*Not a directory.*: run it again .*able to write there"),
        ({"RAY_TMPDIR": f"/tmp/{'x' * 90}"}, "Ray does not start here .* and RAY_TMPDIR may have at most 38 char"),
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


def test_a_ray_of_its_own_has_the_cores_that_taskset_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"})
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", ray_constants.ENABLE_RAY_CLUSTER)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    started = []
    monkeypatch.setattr(cluster.ray, "init", lambda address, **options: started.append((address, options)))
    with cluster.connected():
        [(address, options)] = started
    # At WARNING, the first line of each run would be Ray's, of tokens.
    assert (address, options["num_cpus"], options["logging_level"]) == ("local", 1, logging.ERROR)


# As on a cloud's machine with Docker: the host's own network is neither the first nor the widest.
FOUND = {
    "lo": IPv4Interface("127.0.0.1/8"),
    "docker0": IPv4Interface("172.17.0.1/16"),
    "ens5": IPv4Interface("172.31.9.8/20"),
}


@pytest.mark.parametrize(
    ("address", "interface"),
    [("172.31.9.8", "ens5"), ("172.17.0.1", "docker0"), ("127.0.0.1", "lo"), ("127.0.0.3", "lo")],
)
def test_the_interface_is_the_one_with_the_nodes_address(address: str, interface: str) -> None:
    assert interface_of(address, FOUND) == interface


def test_an_address_of_another_machine_is_refused_with_what_there_is() -> None:
    with pytest.raises(ValueError, match=rf"no network interface has .* 172.31.9.9 .*ens5 172\.31\.9\.8.*{GLOO}"):
        interface_of("172.31.9.9", FOUND)


def test_what_the_environment_names_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setenv(GLOO, "bond0")
    monkeypatch.setenv(NCCL, "")
    use_node_interface()
    assert (os.environ[GLOO], os.environ[NCCL]) == ("bond0", "=lo")
    monkeypatch.setenv(NCCL, "ib0")
    use_node_interface()
    assert (os.environ[GLOO], os.environ[NCCL]) == ("bond0", "ib0")


def test_a_storage_on_one_nodes_disk_is_refused_before_the_start(
    shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, other = (Node(str(i), f"10.77.0.{i}", gpus=0, cpus=1) for i in (1, 2))
    monkeypatch.setattr(train, "connected", contextlib.nullcontext)
    monkeypatch.setattr(train, "alive_nodes", lambda: [here, other])
    monkeypatch.setattr(train, "launch", lambda *_: pytest.fail("it started"))
    monkeypatch.setattr(train, "on_each", lambda _, digest, path: {here: digest(path), other: NoAnswer("no such file")})
    run = TrainConfig(str(shard_set), str(tmp_path), "a", workers=Workers(2, 2), gpus=False, batch_size=4)
    told = (
        rf"--storage {tmp_path}/a is a folder of .* that 1 node\(s\) .* do not see \(10.77.0.2: no such file\): .*s3://"
    )
    with pytest.raises(ValueError, match=told):
        train.main(run)
    assert not list((tmp_path / "a").iterdir())
