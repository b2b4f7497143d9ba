"""The files that launch clusters pass Ray's validator and keep what users rely on; their commands do what they say.

No network, AWS account or boto3: the commands run here with stand-ins for what would touch a machine.
"""

from __future__ import annotations

import copy
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests import ROOT

Config = dict[str, Any]


@pytest.fixture
def config() -> Config:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def validated(config: Config) -> Config:
    """What `ray up` makes of a configuration: AWS's defaults filled in, then Ray's validation."""
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def test_ray_accepts_it_and_it_keeps_what_users_rely_on(config: Config) -> None:
    prepared = validated(config)
    head = prepared["available_node_types"][prepared["head_node_type"]]
    workers = [node for name, node in prepared["available_node_types"].items() if name != prepared["head_node_type"]]
    start = {kind: " ".join(prepared[f"{kind}_start_ray_commands"]) for kind in ("head", "worker")}
    setup = {kind: " ".join(prepared[f"{kind}_setup_commands"]) for kind in ("head", "worker")}
    # The locked packages on all nodes, and none of those that Ray would install by itself.
    assert prepared["file_mounts"]["~/requirements.lock"] == "requirements.lock"
    assert (ROOT / "requirements.lock").is_file()
    assert all("pip install --no-cache-dir -r ~/requirements.lock" in commands for commands in setup.values())
    assert not any("ray-wheels" in commands or "ray-3.0.0" in commands for commands in setup.values())
    # The token is asked for and handed on, and stands in no file; the world reaches no port.
    assert all("export RAY_AUTH_MODE=token;" in commands for commands in start.values())
    assert prepared["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "RAY_AUTH_TOKEN" not in yaml.safe_dump(prepared)
    assert not prepared["provider"].get("security_group", {}).get("IpPermissions")
    assert "--dashboard-host=127.0.0.1 " in start["head"]
    # A head that trains nothing and stays, and spot nodes of one kind with GPUs and a local disk; all reach S3.
    assert (head["resources"]["GPU"], head["resources"]["CPU"]) == (0, 0)
    assert "InstanceMarketOptions" not in head["node_config"]
    assert [node["resources"]["GPU"] for node in workers] == [1, 8]
    assert sorted(bool(node["max_workers"]) for node in workers) == [False, True]
    assert all(node["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"} for node in workers)
    assert all("/mnt/nvme" in " ".join(node["initialization_commands"]) for node in workers)
    assert all("IamInstanceProfile" in node["node_config"] for node in [head, *workers])
    # Nodes are terminated once idle, but not while others are set up, and cost no more than is meant.
    assert prepared["provider"]["cache_stopped_nodes"] is False
    assert prepared["idle_timeout_minutes"] >= 20
    assert 0 < prepared["max_workers"] <= 4
    assert all(node["min_workers"] == 0 for node in workers)


class Shell:
    """Runs a node's command with a home and stand-in programs of its own; `calls` says what they were asked."""

    def __init__(self, folder: Path) -> None:
        self.home = folder
        self.programs = folder / "bin"
        self.programs.mkdir()
        self.log = folder / "calls"
        self.log.touch()

    def program(self, name: str, script: str = "", folder: Path | None = None) -> None:
        path = (folder or self.programs) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> "{self.log}"\n{script}\n')
        path.chmod(0o755)

    def run(self, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        # As the launcher runs it: in a subshell, at the end of a chain.
        chain = ["bash", "-c", f"true && ({command})"]
        home = {"HOME": str(self.home), "PATH": f"{self.programs}{os.pathsep}{os.environ['PATH']}"}
        return subprocess.run(chain, env=home | environment, capture_output=True, text=True, timeout=30, check=False)

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_our_ray_starts_with_the_token_mode_and_the_default_routes_interface_or_not_at_all(
    config: Config, shell: Shell, kind: str
) -> None:
    command = config[f"{kind}_start_ray_commands"][-1]
    shell.program("ip")
    done = shell.run(command)
    assert (done.returncode, "no default route" in done.stderr) == (1, True)
    shell.program("ip", "echo default via 10.0.0.1 dev ens5 proto dhcp src 10.0.0.7; echo default dev ens6")
    shell.program("ray")  # Another Ray, on the PATH: not ours.
    assert shell.run(command).returncode == 127
    assert not [call for call in shell.calls if call.startswith("ray")]

    shell.program("ray", "env", folder=shell.home / "venv" / "bin")
    done = shell.run(command, OMP_NUM_THREADS="1", RAY_HEAD_IP="10.0.0.1")
    assert done.returncode == 0, done.stderr
    seen = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert (seen["GLOO_SOCKET_IFNAME"], seen["NCCL_SOCKET_IFNAME"]) == ("ens5", "ens5")
    assert seen["RAY_AUTH_MODE"] == "token"
    assert "OMP_NUM_THREADS" not in seen
    where = "--head --port=6379 --dashboard-host=127.0.0.1" if kind == "head" else "--address=10.0.0.1:6379"
    assert shell.calls[-1].startswith(f"ray start {where}")


@pytest.mark.parametrize(
    ("mounted", "disks", "expected"),
    [
        ("/mnt/nvme", "", []),
        ("/opt/dlami/nvme", "", ["mount --bind /opt/dlami/nvme /mnt/nvme", "chown ubuntu:ubuntu /mnt/nvme"]),
        (
            "",
            "/dev/nvme0n1 Amazon Elastic Block Store\n/dev/nvme1n1 Amazon EC2 NVMe Instance Storage\n"
            "/dev/nvme2n1 Amazon EC2 NVMe Instance Storage",
            [
                "mdadm --create /dev/md0 --run --force --level=0 --raid-devices=2 /dev/nvme1n1 /dev/nvme2n1",
                "mkfs.ext4 -q -E lazy_itable_init=1 /dev/md0",
                "mount -o noatime /dev/md0 /mnt/nvme",
                "chown ubuntu:ubuntu /mnt/nvme",
            ],
        ),
        ("", "/dev/nvme0n1 Amazon Elastic Block Store", None),
    ],
    ids=["done before", "mounted by the AMI", "two bare disks", "no instance store"],
)
def test_the_instance_store_is_mounted_at_mnt_nvme(
    config: Config, shell: Shell, mounted: str, disks: str, expected: list[str] | None
) -> None:
    shell.program("sudo", '"$@"')
    shell.program("mountpoint", f'test "$2" = "{mounted}"')
    shell.program("lsblk", f"echo '{disks}'")
    shell.program("systemctl", "exit 5")  # No such service.
    for name in ("mkdir", "mount", "mdadm", "mkfs.ext4", "chown"):
        shell.program(name)
    done = shell.run(config["available_node_types"]["gpu"]["initialization_commands"][0])
    changes = [call for call in shell.calls if call.split()[0] in ("mount", "mdadm", "mkfs.ext4", "chown")]
    if expected is None:
        assert (done.returncode, "no NVMe instance store" in done.stderr, changes) == (1, True, [])
    else:
        assert (done.returncode, changes) == (0, expected)


def test_ray_accepts_its_docker_block_in_which_the_nodes_disk_is_mounted(config: Config) -> None:
    block = re.search(r"^# docker:\n(#   .*\n)+", (ROOT / "cluster.yaml").read_text(), re.MULTILINE)
    assert block is not None
    docker = yaml.safe_load(re.sub("^# ", "", block[0], flags=re.MULTILINE))
    validated({**config, **docker})
    assert "-v /mnt/nvme:/mnt/nvme" in docker["docker"]["worker_run_options"]


def test_the_google_twin_is_accepted_and_starts_ray_as_the_other_does(config: Config) -> None:
    twin = yaml.safe_load((ROOT / "cluster-gcp.yaml").read_text())
    prepared = validated(twin)
    for key in ("file_mounts", "setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        assert twin[key] == config[key]
    assert prepared["idle_timeout_minutes"] >= 20
    assert prepared["provider"]["cache_stopped_nodes"] is False
    types = prepared["available_node_types"]
    assert [(types[n]["resources"]["GPU"], types[n]["max_workers"]) for n in ("gpu", "gpu8")] == [(1, 1), (8, 0)]
    account = f"ray-autoscaler-sa-v1@{twin['provider']['project_id']}.iam.gserviceaccount.com"
    for name, ssds in (("gpu", 1), ("gpu8", 8)):
        node = types[name]["node_config"]
        assert (types[name]["min_workers"], node["scheduling"]["provisioningModel"]) == (0, "SPOT")
        assert [disk["type"] for disk in node["disks"]].count("SCRATCH") == ssds
        assert [given["email"] for given in node["serviceAccounts"]] == [account]
    assert not any("ray-3.0.0" in command for command in prepared["head_setup_commands"])


@pytest.fixture
def slurm(shell: Shell, tmp_path: Path) -> Shell:
    """Stand-ins for Slurm's programs: `srun` runs what it is given, and ray what comes after its --."""
    for name in ("jobs", ".venv/bin", "runs/first"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    shell.program("scontrol", "echo node7; echo node8")
    shell.program("srun", '"$@"')
    shell.program("ray", 'while [ "$1" != -- ]; do shift; done; shift; "$@"')
    return shell


SLURM = {"JOB_NODELIST": "node[7-8]", "JOB_ID": "41", "JOB_NUM_NODES": "2", "CPUS_PER_TASK": "48", "GPUS_ON_NODE": "4"}


def sbatch(slurm: Shell, arguments: str) -> subprocess.CompletedProcess[str]:
    script = shlex.quote(str(ROOT / "slurm" / "train.sbatch"))
    variables = {"SUBMIT_DIR": str(slurm.home), **SLURM}
    return slurm.run(f"bash {script} {arguments}", **{f"SLURM_{name}": value for name, value in variables.items()})


def test_slurm_starts_ray_on_all_nodes_and_training_on_the_first(slurm: Shell) -> None:
    slurm.program("python", 'echo "$RAY_ADDRESS $RAY_AUTH_MODE"; exit 3')
    done = sbatch(slurm, f"--storage {slurm.home}/runs --name first --gpus")
    assert done.returncode == 3, done.stderr
    assert done.stdout.splitlines() == ["node7:20041 token"]
    assert f"python jobs/train.py --storage {slurm.home}/runs --name first --gpus" in slurm.calls
    [ray] = [call for call in slurm.calls if call.startswith("ray")]
    assert ray.startswith("ray symmetric-run --address node7:20041 --min-nodes 2 --num-cpus=48 --num-gpus=4 -- env")


def test_slurms_signal_becomes_the_runs_stop_file(slurm: Shell) -> None:
    stop = slurm.home / "runs" / "first" / "STOP"
    # As training does: ends with 1 once it finds the file. Its parents are env, ray's and srun's stand-ins, the script.
    slurm.program("python", f'kill -TERM "$SCRIPT"; until test -s {stop}; do sleep 0.1; done; exit 1')
    slurm.program("activate", folder=slurm.home / ".venv" / "bin")
    (slurm.home / ".venv" / "bin" / "activate").write_text("export SCRIPT=$$\n")
    done = sbatch(slurm, f"--storage {slurm.home}/runs --name first")
    assert done.returncode == 1, done.stderr
    assert "Slurm ends this job soon" in stop.read_text()


@pytest.mark.parametrize("arguments", ["--name first", "--storage s3://BUCKET/runs --name first", "--storage runs"])
def test_slurm_cannot_stop_a_run_whose_folder_it_does_not_see(slurm: Shell, arguments: str) -> None:
    done = sbatch(slurm, arguments)
    assert (done.returncode, done.stderr.startswith("error: ")) == (1, True)
    assert slurm.calls == []
