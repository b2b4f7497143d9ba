"""What many tests read and none changes, servers of the object stores, and who runs what."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer
from xdist.scheduler import LoadFileScheduling

from tests.damage import own_copy
from tests.photographs import build_shard_set, write_source
from tests.shard_sets import make, planned

TRAIN = (
    "tests/cluster/",
    "tests/training/",
    "tests/diagnostics/test_doctor.py",
    "tests/diagnostics/test_benchmark.py",
    "tests/test_demo.py",
)
BESIDE = (
    "tests/images/",
    "tests/sharding/",
    "tests/training/test_hang.py",
    "tests/training/test_init_from.py",
    "tests/training/test_loss_curve.py",
)


class OneTrainingAtATime(LoadFileScheduling):
    """A file's tests share fixtures, so they stay in one process of `pytest -n N --dist loadfile`.

    The files whose slow tests train whole runs with Ray all stay in one, while the others run the rest: who trains
    takes up to 6 GB and all cores. The other slow ones of Ray or of whole networks stay in another.
    """

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        if "pytest.mark.slow" not in (self.config.rootpath / file).read_text():
            return file
        return "beside" if file.startswith(BESIDE) else "training" if file.startswith(TRAIN) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    return OneTrainingAtATime(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, 45 training and 15 validation images, ten to a shard."""
    root = tmp_path_factory.mktemp("shard_set")
    return build_shard_set(write_source(root / "images", images=20), root / "shards")


@pytest.fixture
def root(shard_set: Path, tmp_path: Path) -> Path:
    """A copy of `shard_set` to spoil."""
    return own_copy(shard_set, tmp_path / "shards")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """15 training and 3 validation images: four shards and one. No test changes them."""
    return write_source(tmp_path_factory.mktemp("source") / "images", images=6, longest=300)


@pytest.fixture
def source(images: Path, tmp_path: Path) -> Path:
    """A copy of the images to spoil."""
    return Path(shutil.copytree(images, tmp_path / "images"))


@pytest.fixture(scope="session")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What they become, uninterrupted and without Ray."""
    return make(tmp_path_factory.mktemp("whole") / "set", planned(images))


@pytest.fixture(scope="session")
def pair(shard_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of two workers and two epochs, never disturbed. No test changes it."""
    from tests.runs import undisturbed  # With torch and Ray, which take seconds.

    return undisturbed(shard_set, tmp_path_factory.mktemp("pair"), 2, 2)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The trainer of a small network, after a run from its start to its end, and the `Recorder` of its checkpoints."""
    from tests.model.test_training import Recorder, SmallData, make_trainer

    trainer, record = make_trainer(), Recorder(tmp_path_factory.mktemp("undisturbed"))
    trainer.fit(SmallData(), record)
    assert len(record.saved) == 12
    return trainer, record


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails is tried again at once."""
    monkeypatch.setattr("pipeline.storage.retry.FIRST_WAIT_S", 0.001)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A real S3 server on loopback, with empty buckets named "bucket" and "runs"; gives its endpoint."""
    for name, value in (("ACCESS_KEY_ID", "test"), ("SECRET_ACCESS_KEY", "test"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    port = _free_port()
    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    # Its contents belong to the process, not to the server.
    urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/reset", data=b"").close()
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
    client.create_bucket(Bucket="bucket")
    client.create_bucket(Bucket="runs")
    yield f"127.0.0.1:{port}"
    # It takes half a second to notice, and nobody asks it any more.
    threading.Thread(target=server.stop).start()


@pytest.fixture
def client(s3: str) -> Any:
    """Amazon's own, of that server."""
    return boto3.client("s3", endpoint_url=f"http://{s3}")


@pytest.fixture
def gcs() -> Iterator[str]:
    """An emulator of Google's object store on loopback, with an empty bucket named "bucket"; gives its endpoint."""
    port = _free_port()
    # A process of its own: this one may wait for it with the interpreter's lock held.
    command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--host=127.0.0.1", f"--port={port}"]
    server = subprocess.Popen([*command, "--in-memory", "--default-bucket=bucket"], stderr=subprocess.DEVNULL)
    try:
        # A client would wait for a quarter of an hour for one that does not start.
        while not _listens(port):
            assert server.poll() is None, f"{command} ended"
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
