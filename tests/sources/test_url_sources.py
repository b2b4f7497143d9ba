"""Sources by URL: the same bytes as from a disk, few requests, nothing downloaded, and failures told apart."""

from __future__ import annotations

import dataclasses
import errno
import json
import pickle
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from pipeline.images.resize import encoder_settings
from pipeline.sharding.shard_plan import plan_shards
from pipeline.sources import tree
from pipeline.sources.files import SourceError, read_bytes
from pipeline.storage.locations import NoRangesError
from pipeline.storage.retry import SourceReadError
from tests.range_server import serving
from tests.shard_sets import build_shard, contents, make
from tests.sources.layouts import images, listed, made, set_plan, write

# SOURCE, SOURCE_VAL and the labels of each form.
PLACES = [
    ("folders", None, None),
    ("tars", None, "tars/wnids.txt"),
    ("tars/ILSVRC2012_img_train.tar", "tars/ILSVRC2012_img_val.tar", "tars/wnids.txt"),
    ("class_tars", None, "class_tars/wnids.txt"),
    ("inside", None, "inside/wnids.txt"),
]


@pytest.fixture
def google(forms: Path, gcs: str) -> str:
    """All forms in a bucket of Google's, without an object for any folder, as its own tools leave it."""
    options = f"?scheme=http&endpoint_override={gcs}"
    filesystem, _ = fs.FileSystem.from_uri(f"gs://anonymous@bucket/{options}")
    for path in forms.rglob("*.*"):
        with filesystem.open_output_stream(f"bucket/{path.relative_to(forms)}") as stream:
            stream.write(path.read_bytes())
    return options


# The same bytes.


@pytest.mark.parametrize(("store", "where"), [("bucket", "s3://bucket"), ("google", "gs://anonymous@bucket")])
def test_a_store_gives_a_disks_bytes(forms: Path, request: pytest.FixtureRequest, store: str, where: str) -> None:
    options = request.getfixturevalue(store)
    right = images(listed(forms / "folders"))
    for source, *others in PLACES:
        val, labels = (None if place is None else f"{where}/{place}{options}" for place in others)
        listing = listed(f"{where}/{source}{options}", val, labels)
        assert images(listing) == right
        assert listing.roots[0].startswith(f"{where}/{source}".replace("anonymous@", ""))
        assert "endpoint" not in "".join(listing.roots) + "".join(entry.where for entry in listing.splits["train"])


def test_http_gives_the_set_that_a_disk_gives(forms: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    with serving(forms / "tars") as server:
        train, val = (f"{server.url}/ILSVRC2012_img_{split}.tar?signature=secret" for split in ("train", "val"))
        listing = listed(train, val, f"{server.url}/wnids.txt")
        plan = set_plan(listing)
        # What went to a worker finds its way by itself.
        sent = tuple(pickle.loads(pickle.dumps(shard)) for shard in plan.shards)
        assert contents(make(tmp_path / "out", dataclasses.replace(plan, shards=sent))) == expected
    assert all("secret" not in entry.where for entry in listing.splits["val"])


def test_shards_give_the_same_bytes_from_a_disk_s3_and_http(forms: Path, bucket: str) -> None:
    shards = forms / "shards"
    right = images(listed(shards))
    assert images(listed(shards / "train" / "x-{00..02}.tar", shards / "val")) == right
    assert images(listed(f"s3://bucket/shards{bucket}")) == right
    with serving(shards) as server:
        assert images(listed(f"{server.url}/train/x-{{00..02}}.tar", f"{server.url}/val/x-{{00..02}}.tar")) == right


# What reading costs.


def test_listing_a_tar_reads_through_near_headers_and_jumps_over_far_ones(tmp_path: Path) -> None:
    near = {f"{i:04d}.jpg": bytes(1000) for i in range(1000)}
    far = {f"{i}.jpg": bytes(5_000_000) for i in range(4)}
    write(tmp_path, {name: {"a.tar": one, "b.tar": one} for name, one in (("near.tar", near), ("far.tar", far))})
    size = {name: (tmp_path / f"{name}.tar").stat().st_size for name in ("near", "far")}
    with serving(tmp_path) as server:
        assert listed(f"{server.url}/near.tar").images == 2000
        assert server.requests < 30
        assert server.bytes < 2.2 * size["near"]
        server.requests = server.bytes = 0
        listing = listed(f"{server.url}/far.tar")
        assert listing.images == 8
        assert server.bytes < 0.03 * size["far"]
        # An image costs one request, for its own bytes.
        entry = listing.splits["train"][0]
        read_bytes(entry.path, entry.offset, entry.size)
        server.requests = server.bytes = 0
        assert read_bytes(entry.path, entry.offset, entry.size) == far["0.jpg"]
        assert (server.requests, server.bytes) == (1, entry.size)


def test_class_tars_are_listed_at_the_same_time(forms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(3)
    true = tree.members_in

    def members_in(file: Any) -> Any:
        if file.tar.inside:
            together.wait(timeout=30)
        return true(file)

    monkeypatch.setattr(tree, "members_in", members_in)
    with serving(forms / "tars") as server:
        assert listed(f"{server.url}/ILSVRC2012_img_train.tar", forms / "folders" / "val").images == 18


# What can go wrong.


@pytest.mark.usefixtures("quick")
def test_a_failing_network_is_tried_again_and_never_the_images_fault(forms: Path, tmp_path: Path) -> None:
    with serving(forms / "tars") as server:
        listing = listed(f"{server.url}/ILSVRC2012_img_train.tar", forms / "folders" / "val")
        entry = listing.splits["train"][0]
        right = read_bytes(entry.path, entry.offset, entry.size)
        server.failures = [503, 0, 500]
        assert read_bytes(entry.path, entry.offset, entry.size) == right
        assert server.failures == []
        server.failures = [503] * 1000
        with pytest.raises(SourceReadError, match=r"cannot be read in 7 attempts: .*503"):
            read_bytes(entry.path, entry.offset, entry.size)
        shard = plan_shards(listing, 0, 100)[0]
        with pytest.raises(
            SourceReadError, match=r"img_train.tar/n\d.tar/.* failed: .*503.*run the same command again"
        ):
            build_shard(tmp_path / "out", shard, encoder_settings(90))
    # The server is gone altogether; so would be the tar, which is no fault of each image in it either.
    with pytest.raises(SourceReadError):
        build_shard(tmp_path / "out", shard, encoder_settings(90))
    with serving(tmp_path) as server, pytest.raises(FileNotFoundError) as missing:
        read_bytes(f"{server.url}/nothing.tar", 0, 10)
    assert missing.value.errno == errno.ENOENT
    assert not list((tmp_path / "out").rglob("*.json"))


def test_a_missing_object_is_the_files_fault(bucket: str, client: Any, tmp_path: Path) -> None:
    listing = listed(f"s3://bucket/folders{bucket}")
    client.delete_object(Bucket="bucket", Key="folders/train/n1/n1_2.JPEG")
    (line,) = made(listing, tmp_path / "out")["rejects.jsonl"].splitlines()
    reject = json.loads(line)
    assert reject["path"] == "s3://bucket/folders/train/n1/n1_2.JPEG"
    assert "No such file" in reject["reason"]


def test_a_server_without_ranges_is_named(forms: Path) -> None:
    with (
        serving(forms / "tars", ranges=False) as server,
        pytest.raises(NoRangesError, match=r"ILSVRC2012_img_train\.tar cannot be read in place: .*range"),
    ):
        listed(f"{server.url}/ILSVRC2012_img_train.tar")


@pytest.mark.usefixtures("quick")
def test_what_is_not_at_a_url_is_named(forms: Path, bucket: str) -> None:
    with serving(forms / "shards" / "train") as server:
        with pytest.raises(
            SourceError, match=r"is no tar, and HTTP cannot list folders: give --source http://HOST/NAME"
        ):
            listed(server.url)
        with pytest.raises(FileNotFoundError, match=r"No such file or directory: 'http://.*/x-03.tar'"):
            listed(f"{server.url}/x-{{00..03}}.tar")
    with pytest.raises(SourceError, match=r"s3://bucket/nothing does not exist: give --source"):
        listed(f"s3://bucket/nothing{bucket}")
    with pytest.raises(ValueError, match="strange://x cannot be opened"):
        listed("strange://x")
    for url in ("http:///x.tar", "http://[::1/x.tar", "https://:99999/x.tar"):
        with pytest.raises(ValueError, match=f"^{re.escape(url)} is no URL that HTTP can open$"):
            listed(f"{url}?signature=SECRET")
