"""What the doctor sends to each node: it looks at the machine and tries what training will do there."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import importlib.metadata
import io
import os
import platform
import resource
import shutil
import statistics
import subprocess
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from jobs.network import join, open_store
from pipeline.dataset import DatasetError, read_dataset
from pipeline.staging import read_remote_dataset
from pipeline.storage import is_url, open_location

PACKAGES = ("ray", "torch", "torchvision", "nvidia-dali-cuda130", "pyarrow", "numpy", "pillow", "safetensors")
OURS = ("pipeline", "model", "jobs")
NVIDIA_SMI_SECONDS = 20
GRADIENT = 62_378_344  # float32 values that a step's all-reduce sums: AlexNet's parameters
ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One line of nvidia-smi."""

    name: str
    driver: str
    utilisation: int
    """Percent."""
    used_mib: int


@dataclasses.dataclass(frozen=True)
class Facts:
    """What one node is."""

    versions: dict[str, str]
    """Python, each package, and a digest of this project's code."""
    auth_mode: str
    """RAY_AUTH_MODE, as Ray's processes on this node have it."""
    nofile: int
    """How many files a process may have open."""
    shm_bytes: int
    """Size of /dev/shm, where DALI, NCCL and Ray's object store share memory; 0 if there is none."""
    free_bytes: int | None
    """In the folder to stage to; None if none was given."""
    gpus: tuple[Gpu, ...]
    gpu_error: str
    """Why nvidia-smi did not tell; empty if it did."""


def code_digest(root: Path) -> str:
    """sha256 over the names and contents of this project's modules."""
    digest = hashlib.sha256()
    for path in sorted(path for package in OURS for path in (root / package).glob("*.py")):
        digest.update(f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]


def read_gpus(text: str) -> tuple[Gpu, ...]:
    """Parses `nvidia-smi --query-gpu=name,driver_version,utilization.gpu,memory.used --format=csv,noheader,nounits`."""
    rows = csv.reader(io.StringIO(text), skipinitialspace=True)
    number = lambda field: int(field) if field.isdigit() else 0  # noqa: E731  ("[N/A]" on some MIG slices)
    return tuple(Gpu(row[0], row[1], number(row[2]), number(row[3])) for row in rows if len(row) == 4)


class Inspector:
    """Runs on one node, as a Ray actor."""

    def facts(self, stage: str | None) -> Facts:
        versions = {"python": platform.python_version()}
        for name in PACKAGES:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                versions[name] = "missing"
        versions["this project's code"] = code_digest(Path(__file__).resolve().parents[1])
        query = ["nvidia-smi", "--query-gpu=name,driver_version,utilization.gpu,memory.used"]
        gpus: tuple[Gpu, ...] = ()
        gpu_error = ""
        try:
            done = subprocess.run(
                [*query, "--format=csv,noheader,nounits"],
                capture_output=True,
                text=True,
                timeout=NVIDIA_SMI_SECONDS,
                check=False,
            )
            gpus = read_gpus(done.stdout)
            if done.returncode:
                gpu_error = " ".join((done.stdout + done.stderr).split())[:200] or f"exit status {done.returncode}"
        except (OSError, subprocess.TimeoutExpired) as error:
            gpu_error = str(error)
        try:
            shm = shutil.disk_usage("/dev/shm").total
        except OSError:
            shm = 0
        return Facts(
            versions,
            os.environ.get("RAY_AUTH_MODE", ""),
            resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            shm,
            None if stage is None else _free(Path(stage)),
            gpus,
            gpu_error,
        )

    def clock(self) -> float:
        """Seconds since the epoch, by this node's clock."""
        return time.time()

    def write(self, location: str, name: str, data: bytes) -> None:
        filesystem, path = open_location(location)
        filesystem.create_dir(path, recursive=True)
        with filesystem.open_output_stream(f"{path}/{name}") as stream:
            stream.write(data)

    def read(self, location: str, name: str) -> bytes:
        filesystem, path = open_location(location)
        with filesystem.open_input_stream(f"{path}/{name}") as stream:
            return bytes(stream.read())

    def remove(self, location: str, name: str) -> None:
        filesystem, path = open_location(location)
        filesystem.delete_file(f"{path}/{name}")

    def digest_shard(self, location: str, split: str, name: str) -> str:
        """sha256 of one shard's tar, read where it lies."""
        filesystem, path = open_location(location)
        digest = hashlib.sha256()
        with filesystem.open_input_stream(f"{path}/{split}/{name}.tar") as stream:
            while chunk := stream.read(8 * 2**20):
                digest.update(chunk)
        return digest.hexdigest()

    def fingerprint(self, location: str) -> str:
        """Of the shard set that this node finds there; raises DatasetError if it finds none."""
        info = read_remote_dataset(location) if is_url(location) else read_dataset(Path(location))
        if not info.splits:
            raise DatasetError(f"the set {location} has no images")
        return info.fingerprint


class Rank:
    """One rank of an all-reduce, as a Ray actor where a training worker would be."""

    def rendezvous(self) -> tuple[str, int]:
        """Opens the rendezvous store; its address and port."""
        return open_store()

    def all_reduce(self, store: tuple[str, int], rank: int, world: int, gpus: bool, seconds: float) -> list[float]:
        """Sums a gradient over all ranks; the seconds of each round.

        Raises:
            ArithmeticError: if the sum is wrong.
            RuntimeError: if a rank cannot be reached in time.
        """
        device = torch.device("cuda" if gpus else "cpu")
        join(store, rank, world, "nccl" if gpus else "gloo", timedelta(seconds=seconds))
        times = []
        try:
            for number in range(ROUNDS + 1):
                values = torch.full((GRADIENT,), float(rank + 1), device=device)
                distributed.barrier()
                started = time.perf_counter()
                distributed.all_reduce(values)
                if gpus:
                    torch.cuda.synchronize()
                # The first round makes the connections.
                if number:
                    times.append(time.perf_counter() - started)
                wanted = world * (world + 1) / 2
                if not bool((values == wanted).all()):
                    raise ArithmeticError(f"the sum over {world} ranks is not {wanted:g} everywhere")
        finally:
            distributed.destroy_process_group()
        return times


def bus_bandwidth(seconds: list[list[float]], world: int) -> tuple[float, float]:
    """The median time of a round, the slowest rank's, and what each rank's link carries in it, in GB/s.

    A ring sends 2 (W - 1) / W of the buffer over each link (nccl-tests, PERFORMANCE.md: "bus bandwidth").
    """
    slowest = statistics.median(max(times) for times in zip(*seconds, strict=True))
    return slowest, GRADIENT * 4 * 2 * (world - 1) / world / slowest / 1e9


def _free(folder: Path) -> int:
    """Free bytes where a folder is, or would be made."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free
