"""A set that two hosts without a common disk write into an object store, of which one dies in the middle."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests import hosts
from tests.photographs import write_source
from tests.runs import Followed
from tests.shard_sets import contents, make, planned, s3_options

pytestmark = [pytest.mark.long, hosts.NEEDED]
PER_SHARD = 4
PORT = 5000
SERVER = f"{hosts.NETWORK}.1:{PORT}"
OUTPUT = f"s3://bucket/set{s3_options(SERVER)}"
SETTINGS = {
    **hosts.IMPATIENT,
    **dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "test"),
    "AWS_DEFAULT_REGION": "us-east-1",
}
CLIENT = f"import boto3, pathlib, sys; client = boto3.client('s3', endpoint_url='http://{SERVER}'); "
CREATE = CLIENT + "client.create_bucket(Bucket='bucket')"
FETCH = CLIENT + (
    "root = pathlib.Path(sys.argv[1]); "
    "pages = client.get_paginator('list_objects_v2').paginate(Bucket='bucket'); "
    "keys = [item['Key'] for page in pages for item in page['Contents']]; "
    "files = [key for key in keys if not key.endswith('/')]; "
    "[(root / key).parent.mkdir(parents=True, exist_ok=True) for key in files]; "
    "[client.download_file('bucket', key, str(root / key)) for key in files]"
)


def test_a_lost_host_leaves_no_trace_in_the_store(tmp_path: Path) -> None:
    images = write_source(tmp_path / "images", images=40, longest=900)
    expected = contents(make(tmp_path / "one_disk", planned(images, per_shard=PER_SHARD)))
    with hosts.cluster((1, 1, 0), tmp_path / "disk", settings=SETTINGS) as three:
        serve = ["python", "-u", "-m", "moto.server", "-H", f"{hosts.NETWORK}.1", "-p", PORT]
        server = Followed(three[0].start(*serve))
        server.wait_for("Running on")
        assert three[0].run("python", "-c", CREATE).returncode == 0
        arguments = ["--source", images, "--output", OUTPUT, "--workers", 2, "--samples-per-shard", PER_SHARD]
        job = Followed(three[2].start(*hosts.SUBMIT, "jobs/shard_imagenet.py", *arguments))
        # The second host has finished a shard and begins to write another.
        lost = f"{hosts.NETWORK}.2 - - "
        for written in (".json", ".tar"):
            server.wait_for(lost)
            while written not in server.lines[-1]:
                server.wait_for(lost)
        three[1].kill()
        # What the server says must go on being read.
        threading.Thread(target=server.end, daemon=True).start()
        assert job.end() == 0, job.text
        fetched = three[0].run("python", "-c", FETCH, tmp_path / "fetched")
        assert fetched.returncode == 0, fetched.stderr
        assert contents(tmp_path / "fetched" / "set") == expected
