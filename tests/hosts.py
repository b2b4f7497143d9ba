"""Several hosts on this machine: namespaces with their own network, name, processes and local disk, and a Ray on each.

    with cluster((1, 1), disk=tmp_path / "disk") as hosts:
        hosts[1].run("ray", "job", "submit", ...)   # as typed on the second host

Host k has the address 10.77.0.k on a bridge, and a name that its own /etc/hosts gives to 127.0.1.1, as Debian does:
what goes by the name's address reaches nobody. /tmp/ray and the folder `disk` are each host's own; every other path is
shared.

Needs root, and the programs of util-linux and iproute2. Nothing has a name outside of the namespaces, so all of it goes
with the processes, and these go with whoever made them, even if that is killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import pytest

from tests import ROOT

NETWORK = "10.77.0"
# What runs a program of this repository as a job, from any host.
SUBMIT = ("ray", "job", "submit", "--address", f"http://{NETWORK}.1:8265", "--working-dir", ROOT, "--", "python")
# Ray calls a host dead that has not answered for fifteen seconds instead of a minute.
IMPATIENT = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "2000"}
PROGRAMS = ("ip", "unshare", "nsenter", "setpriv", "bash")
# The first process of a host. It waits for the network on stdin, and starts Ray in the background: the first process of
# a PID namespace must collect its orphans, which Ray does not.
BOOT = """
set -e
echo "$NAME" > /proc/sys/kernel/hostname
printf '127.0.0.1 localhost\\n127.0.1.1 %s\\n' "$NAME" > "$HOSTS"
mount --bind "$HOSTS" /etc/hosts
mount -t tmpfs tmpfs /tmp/ray
mount -t tmpfs tmpfs "$DISK"
echo booted
read -r
"$@" 2>&1 &
wait $!
"""


@dataclasses.dataclass
class Host:
    """One host, with a Ray that joins the first host's."""

    name: str
    address: str
    environment: dict[str, str]
    process: subprocess.Popen[str]
    """Its end is the end of all processes of the host."""
    switch: int = 0
    """The process whose network has the bridge."""
    port: str = ""
    """The bridge's end of the host's cable."""

    @property
    def pid(self) -> int:
        """Of the host's first process, as seen from outside."""
        return int(Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text())

    def run(self, *command: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Runs a command on the host, in this process's working directory."""
        return subprocess.run(
            self._within(*command),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def start(self, *command: object) -> subprocess.Popen[str]:
        """Starts a command on the host, in this process's working directory."""
        return subprocess.Popen(
            self._within(*command),
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def _within(self, *command: object) -> list[str]:
        namespaces = ["--mount", "--net", "--uts", "--pid"]
        return ["nsenter", f"--target={self.pid}", *namespaces, "--wd=.", *map(str, command)]

    def link(self, state: Literal["up", "down"]) -> None:
        """Cuts or mends the host's cable: what is sent meanwhile is lost, and nobody is told."""
        _ip(self.switch, "link", "set", self.port, state)

    def path(self, path: Path) -> Path:
        """Where this process finds a path of the host's."""
        return Path(f"/proc/{self.pid}/root{path}")

    def wait_for(self, words: str) -> None:
        """Reads what the host's first process prints, up to a line with the words.

        Raises:
            RuntimeError: if it ends before.
        """
        assert self.process.stdout is not None
        seen = []
        for line in self.process.stdout:
            seen.append(line)
            if words in line:
                return
        raise RuntimeError(f"{self.name} ended before it said {words!r}: {''.join(seen)}")

    def kill(self) -> None:
        """SIGKILLs the whole host."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


def missing() -> str | None:
    """Why no hosts can be made here; None if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)} (apt-get install util-linux iproute2)"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "ip", "link", "add", "br0", "type", "bridge"],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"no namespaces: {tried.stderr.strip()}" if tried.returncode else None


MISSING = missing()
NEEDED = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@contextlib.contextmanager
def cluster(cpus: Sequence[int], disk: Path, settings: Mapping[str, str] | None = None) -> Iterator[list[Host]]:
    """Hosts with a Ray cluster that asks for a token; the first is its head.

    Args:
        cpus: what each host offers to Ray.
        disk: a folder to make; its contents are each host's own.
        settings: environment variables of all hosts.
    """
    disk.mkdir()
    Path("/tmp/ray").mkdir(exist_ok=True)
    environment = {**_environment(), **(settings or {})}
    with contextlib.ExitStack() as stack:
        switch = _spawn([*_namespace("net"), "bash", "-c", "echo up; read -r"], dict(os.environ))
        stack.callback(Host("switch", "", {}, switch).kill)
        assert switch.stdout is not None
        switch.stdout.readline()
        _ip(switch.pid, "link", "add", "br0", "type", "bridge")
        _ip(switch.pid, "link", "set", "br0", "up")
        hosts = []
        for number, offered in enumerate(cpus, 1):
            name, address = f"host{number}", f"{NETWORK}.{number}"
            start = ["ray", "start", "--block", f"--node-ip-address={address}", f"--num-cpus={offered}", "--num-gpus=0"]
            start.append(f"--object-store-memory={200 * 2**20}")
            if number == 1:
                start += ["--head", "--port=6379", f"--dashboard-host={address}", "--dashboard-port=8265"]
            else:
                start.append(f"--address={NETWORK}.1:6379")
            local = {"NAME": name, "DISK": str(disk), "HOSTS": str(disk.parent / f"{disk.name}-{name}-hosts")}
            process = _spawn(
                [*_namespace("net", "mount", "uts", "pid"), "bash", "-c", BOOT, name, *start], {**environment, **local}
            )
            port = f"port{number}"
            host = Host(name, address, environment, process, switch.pid, port)
            stack.callback(host.kill)
            host.wait_for("booted")
            _ip(host.pid, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", str(switch.pid))
            _ip(host.pid, "address", "add", f"{address}/24", "dev", "eth0")
            _ip(switch.pid, "link", "set", port, "master", "br0", "up")
            for link in ("lo", "eth0"):
                _ip(host.pid, "link", "set", link, "up")
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
            host.wait_for("Ray runtime started")
            hosts.append(host)
        yield hosts


def _environment() -> dict[str, str]:
    """Ours, less what would lead to another cluster or decide the interface, with a token."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "GLOO_", "NCCL_")) and not name.lower().endswith("_proxy")
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return {**kept, **token, "PATH": path, "RAY_USAGE_STATS_ENABLED": "0"}


def _namespace(*kinds: str) -> list[str]:
    pid = ["--kill-child", "--mount-proc"] if "pid" in kinds else []
    return ["setpriv", "--pdeathsig=KILL", "unshare", *(f"--{kind}" for kind in kinds), *pid]


def _spawn(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _ip(pid: int, *arguments: str) -> None:
    """Runs `ip` in a process's network."""
    subprocess.run(["nsenter", f"--target={pid}", "--net", "ip", *arguments], check=True, timeout=10)
