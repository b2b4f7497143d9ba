"""The doctor's checks: what each node and each rank of a cluster tries, and the table's rows that come of it."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import platform
import random
import resource
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pyarrow import fs

from jobs.cluster.nodes import NoAnswer, Node, collect, on_each
from jobs.diagnostics.probe import GRADIENT
from pipeline.dataset.info import DatasetError, read_dataset
from pipeline.storage.locations import join, open_location
from pipeline.storage.remote import chunks

MIN_FILES = 16_384  # ImageNet's 1,065 shards stay mapped, beside a socket to each peer and Ray's own.
MIN_SHM_GIB = 2.0  # Docker gives 64 MB unless told; NCCL, DALI and Ray's object store want more.
MAX_SECONDS = 5.0  # Of a gradient: so long takes a network of 1 Gb/s, and each step of AlexNet would wait for it.
STEP_SECONDS = 120.0  # For what reads data or sums gradients.
SHOWN = 5  # Faults of one row; the first of them usually explain the rest.
PACKAGES = ("ray", "torch", "torchvision", "nvidia-dali-cuda130", "pyarrow", "numpy", "pillow", "safetensors")
OURS = ("pipeline", "model", "jobs")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One row of the table."""

    check: str
    status: Literal["ok", "failed", "skipped"]
    found: str
    cure: str = ""
    """What to do; empty where there is nothing to do."""


@dataclasses.dataclass(frozen=True)
class NodeCheck:
    """A row about all nodes."""

    name: str
    function: Callable[..., str]
    """Runs on each node. Returns what is there, or raises ValueError or OSError with what is wrong."""
    cure: str
    needs: tuple[str, ...] = ()
    """The flags whose values it takes; it is skipped where one is not given."""
    must_match: bool = False
    """Whether all nodes must return the same."""

    def run(self, nodes: Iterable[Node], given: Mapping[str, str | None]) -> Finding:
        """Runs it on all nodes, with the values of the flags: absolute paths, or URLs."""
        if missing := [f"--{name}" for name in self.needs if given[name] is None]:
            return Finding(self.name, "skipped", f"give {' and '.join(missing)} to check it")
        arguments = [given[name] for name in self.needs]
        answers = on_each(nodes, self.function, *arguments, seconds=STEP_SECONDS)
        return judge(self.name, answers, self.cure, self.must_match)


def judge(name: str, answers: Mapping[Any, Any], cure: str, must_match: bool = False) -> Finding:
    """Failed if a node or a rank did not answer, or answers differ where all must be equal."""
    wrong = [f"{who}: {answer.why}" for who, answer in answers.items() if isinstance(answer, NoAnswer)]
    if must_match and not wrong:
        parts = {who: answer.split(", ") for who, answer in answers.items()}
        common = set.intersection(*map(set, parts.values()))
        odd = {who: [part for part in own if part not in common] for who, own in parts.items()}
        wrong = [f"{who} has {', '.join(own)}" for who, own in odd.items() if own]
    found = wrong or list(dict.fromkeys(answers.values()))
    text = "; ".join(found[:SHOWN]) + (f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
    return Finding(name, "failed", text, cure) if wrong else Finding(name, "ok", text)


def versions() -> str:
    """Python, the packages and a digest of this project's code."""
    found = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}
    root = Path(__file__).resolve().parents[2]
    code = hashlib.sha256()
    for path in sorted(path for package in OURS for path in (root / package).rglob("*.py")):
        code.update(f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return ", ".join(f"{name} {version}" for name, version in {**found, "code": code.hexdigest()[:12]}.items())


def open_files() -> str:
    """A process may have all shards open."""
    count = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if count < MIN_FILES:
        raise ValueError(f"{count:,}, at least {MIN_FILES:,} needed")
    return f"{count:,}"


def shared_memory() -> str:
    """/dev/shm is large enough."""
    size = shutil.disk_usage("/dev/shm").total / 2**30 if os.path.isdir("/dev/shm") else 0.0
    if size < MIN_SHM_GIB:
        raise ValueError(f"{size:.2f} GiB, at least {MIN_SHM_GIB:g} needed")
    return f"{size:.1f} GiB"


def storage(location: str, marker: str) -> str:
    """This node can write, and finds the file that another one wrote."""
    own = f".doctor-{secrets.token_hex(8)}"
    write_file(location, own)
    remove_file(location, own)
    filesystem, path = open_location(location)
    if filesystem.get_file_info(f"{path}/{marker}").type != fs.FileType.File:
        raise ValueError("does not read what another node wrote")
    return "written and read on each node"


def write_file(storage: str, name: str) -> None:
    """Writes a small file that holds its own name."""
    filesystem, path = open_location(storage)
    filesystem.create_dir(path, recursive=True)
    with filesystem.open_output_stream(f"{path}/{name}") as stream:
        stream.write(name.encode())


def remove_file(storage: str, name: str) -> None:
    filesystem, path = open_location(storage)
    filesystem.delete_file(f"{path}/{name}")


def data(location: str) -> str:
    """The set is there, and a shard of each split has the right bytes."""
    info = read_dataset(location)
    for split, row in [(split, random.choice(part.shards)) for split, part in info.splits.items() if part.shards]:
        digest = hashlib.sha256()
        for chunk in chunks(join(location, split, f"{row.name}.tar")):
            digest.update(chunk)
        if digest.hexdigest() != row.sha256:
            raise DatasetError(
                f"{split}/{row.name}.tar is not the shard that dataset.json describes: `python jobs/verify_shards.py "
                "--data SET` finds all damage, and says how to repair it"
            )
    return f"{sum(part.samples for part in info.splits.values())} images, fingerprint {info.fingerprint[:12]}"


def disk(location: str, stage: str) -> str:
    """The set has room in the folder to stage to."""
    need = sum(part.bytes for part in read_dataset(location).splits.values())
    folder = Path(stage)
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    found = f"{free / 1e9:.1f} GB free, {need / 1e9:.1f} GB needed"
    if free < need:
        raise ValueError(found)
    return found


NODE_CHECKS = (
    NodeCheck(
        "versions",
        versions,
        "install requirements.lock with the same Python on each node; `ray job submit --working-dir .` brings the code",
        must_match=True,
    ),
    NodeCheck("open files", open_files, "`ulimit -n 65536` before `ray start` (a container: --ulimit nofile=65536)"),
    NodeCheck("/dev/shm", shared_memory, "`docker run --shm-size`, an emptyDir of medium Memory in Kubernetes"),
    NodeCheck(
        "storage",
        storage,
        "give a --storage that every node can write and read: a URL (s3://, gs://) or a shared mount",
        ("storage", "marker"),
    ),
    NodeCheck(
        "data",
        data,
        "give a finished set on a mount that every node has; or one in an object store, with --stage",
        ("data",),
        must_match=True,
    ),
    NodeCheck(
        "disk",
        disk,
        "free some, or give a larger disk with --stage; what was staged there before counts as used",
        ("data", "stage"),
    ),
)
"""In the order in which one explains the next."""


def check_gpus(ranks: Mapping[str, Any]) -> Finding:
    """Torch and DALI compute on each rank's GPU; `ranks` are actors of `jobs.diagnostics.probe.Rank` by name."""
    answers = collect({name: rank.use_device.remote("gpu") for name, rank in ranks.items()}, STEP_SECONDS)
    cure = f"`nvidia-smi` there must list the GPU and a driver for CUDA {torch.version.cuda}; then start Ray again"
    return judge("GPUs", answers, cure)


def check_all_reduce(ranks: Mapping[str, Any], gpus: bool) -> Finding:
    """All ranks sum AlexNet's gradient, at a rate that one can train at."""
    backend = "nccl" if gpus else "gloo"
    first = next(iter(ranks))
    answers = collect({first: ranks[first].rendezvous.remote()})
    if not isinstance(answers[first], NoAnswer):
        calls = {
            name: actor.all_reduce.remote(answers[first], rank, len(ranks), backend)
            for rank, (name, actor) in enumerate(ranks.items())
        }
        answers = collect(calls, STEP_SECONDS)
    cure = (
        "all ports between the nodes must be open; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, if set, must name the "
        "interface with the node's address, and be so before `ray start`; NCCL_DEBUG=INFO tells more"
    )
    if any(isinstance(answer, NoAnswer) for answer in answers.values()):
        return judge("all-reduce", answers, cure)
    if len(ranks) == 1:
        return Finding("all-reduce", "ok", f"{backend}, one rank, which has nobody to exchange with")
    seconds = max(answers.values())
    found = f"{backend}, {len(ranks)} rank(s): AlexNet's gradient, {GRADIENT * 4e-9:.2f} GB, in {seconds:.3f} s"
    if seconds > MAX_SECONDS:
        return Finding("all-reduce", "failed", f"{found}, which is too slow to train at", cure)
    return Finding("all-reduce", "ok", found)
