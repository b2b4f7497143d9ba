"""The interface that carries the node's address: by rule, on this machine, and only where none was named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from ipaddress import IPv4Interface

import pytest
import ray

from jobs.cluster.network import GLOO, NCCL, interface_of, interfaces, use_node_interface

# As on a cloud's machine with Docker: the host's own network is neither the first nor the widest.
FOUND = {
    "lo": IPv4Interface("127.0.0.1/8"),
    "docker0": IPv4Interface("172.17.0.1/16"),
    "ens5": IPv4Interface("172.31.9.8/20"),
}


def test_the_interface_is_the_one_with_the_nodes_address() -> None:
    assert [interface_of(one, FOUND) for one in ("172.31.9.8", "172.17.0.1", "127.0.0.1")] == ["ens5", "docker0", "lo"]


def test_all_of_loopback_is_on_lo() -> None:
    assert interface_of("127.0.0.3", FOUND) == "lo"


@pytest.mark.parametrize("address", ["172.31.9.9", "8.8.8.8"])
def test_an_address_of_another_machine_is_refused_with_what_there_is(address: str) -> None:
    with pytest.raises(ValueError, match=rf"no network interface has .* {address} .*ens5 172\.31\.9\.8.*{GLOO}"):
        interface_of(address, FOUND)


@pytest.mark.skipif(shutil.which("ip") is None, reason="iproute2 is not installed")
def test_interfaces_agree_with_iproute2() -> None:
    shown = json.loads(subprocess.run(["ip", "-json", "-4", "address"], capture_output=True, check=True).stdout)
    first = {link["ifname"]: link["addr_info"][0] for link in shown if link.get("addr_info")}
    assert "lo" in first
    assert interfaces() == {name: IPv4Interface(f"{info['local']}/{info['prefixlen']}") for name, info in first.items()}


def test_what_the_environment_names_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setenv(GLOO, "bond0")
    monkeypatch.setenv(NCCL, "")
    use_node_interface()
    assert (os.environ[GLOO], os.environ[NCCL]) == ("bond0", "=lo")
    monkeypatch.setenv(NCCL, "ib0")
    use_node_interface()
    assert (os.environ[GLOO], os.environ[NCCL]) == ("bond0", "ib0")
