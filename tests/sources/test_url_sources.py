"""Sources by URL: the same bytes as from a disk, few requests, nothing downloaded, and failures told apart."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
import tarfile
import threading
from pathlib import Path
from typing import Any

import boto3
import pytest
from pyarrow import fs

from pipeline.images.resize import encoder_settings
from pipeline.sharding.read_ahead import readings
from pipeline.sharding.set_folder import claim_folder
from pipeline.sharding.shard_plan import SetPlan, plan_shards
from pipeline.sharding.shard_set import finish
from pipeline.sharding.shards import build_shard
from pipeline.sources import tree
from pipeline.sources.files import SourceError, read_bytes
from pipeline.sources.listing import Listing
from pipeline.sources.sources import read_source
from pipeline.storage.locations import NoRangesError, child, shown
from pipeline.storage.retry import SourceReadError
from tests.photographs import write_source
from tests.range_server import serving
from tests.sources.test_tar_sources import made, tar_of, tar_of_tars

ODD_NAME = "n0_a b%20?#é.JPEG"


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as folders/, tars/ (ImageNet's), class_tars/ and shards/ with dataset.json above them."""
    root = tmp_path_factory.mktemp("forms")
    train, val = root / "folders" / "train", root / "folders" / "val"
    write_source(train, images=4, longest=280)
    (train / "n0" / "n0_0.JPEG").rename(train / "n0" / ODD_NAME)
    write_source(val, images=2, longest=280, first_seed=50)
    for folder in sorted(val.iterdir()):
        for file in sorted(folder.iterdir()):
            file.rename(folder / f"val_{file.name}")
    (root / "tars").mkdir()
    (root / "tars" / "ILSVRC2012_img_train.tar").write_bytes(tar_of_tars(train))
    images = {file.name: file for file in sorted(val.rglob("*.JPEG"))}
    flat = tar_of({name: file.read_bytes() for name, file in images.items()})
    wnids = "".join(f"{file.parent.name}\n" for file in images.values())
    (root / "tars" / "ILSVRC2012_img_val.tar").write_bytes(flat)
    (root / "tars" / "wnids.txt").write_text(wnids)
    beside, inside = root / "class_tars", root / "inside"
    (inside / "train").mkdir(parents=True)
    with tarfile.open(root / "tars" / "ILSVRC2012_img_train.tar") as tar:
        tar.extractall(beside, filter="data")
        tar.extractall(inside / "train", filter="data")
    for folder in (beside, inside):
        (folder / "ILSVRC2012_img_val.tar").write_bytes(flat)
        (folder / "wnids.txt").write_text(wnids)
    for split in ("train", "val"):
        samples: dict[str, bytes] = {}
        for label in range(3):
            for file in sorted((root / "folders" / split / f"n{label}").iterdir()):
                key = file.stem.replace(".", "_")
                samples |= {f"{key}.jpg": file.read_bytes(), f"{key}.cls": str(label).encode()}
        (root / "shards" / split).mkdir(parents=True)
        half = len(samples) // 4 * 2
        for number, items in enumerate((list(samples.items())[:half], list(samples.items())[half:])):
            (root / "shards" / split / f"x-{number:02d}.tar").write_bytes(tar_of(dict(items)))
    return root


def listed(source: str | Path, val: str | Path | None = None, labels: str | Path | None = None) -> Listing:
    return read_source(source, val, 0.25, 0, labels)


@pytest.fixture(scope="module")
def expected(forms: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The set that the folders give."""
    return made(listed(forms / "folders"), tmp_path_factory.mktemp("expected") / "out")


@pytest.fixture
def bucket(forms: Path, s3: str) -> str:
    """All forms in a bucket; what stands behind a URL's path."""
    client = boto3.client("s3", endpoint_url=f"http://{s3}")
    client.create_bucket(Bucket="bucket")
    for path in forms.rglob("*.*"):
        if path.is_file():
            client.upload_file(str(path), "bucket", str(path.relative_to(forms)))
    return f"?region=us-east-1&scheme=http&endpoint_override={s3}"


@pytest.fixture
def google(forms: Path, gcs: str) -> str:
    """All forms in a bucket of Google's, without an object for any folder, as its own tools leave it."""
    options = f"?scheme=http&endpoint_override={gcs}"
    filesystem, _ = fs.FileSystem.from_uri(f"gs://anonymous@bucket/{options}")
    for path in forms.rglob("*.*"):
        if path.is_file():
            with filesystem.open_output_stream(f"bucket/{path.relative_to(forms)}") as stream:
                stream.write(path.read_bytes())
    return options


# The same bytes.


@pytest.mark.parametrize("form", ["class_tars", "inside"])
def test_class_tars_beside_each_other_give_the_same_bytes(
    forms: Path, expected: dict[str, bytes], tmp_path: Path, form: str
) -> None:
    listing = listed(forms / form, labels=forms / form / "wnids.txt")
    assert made(listing, tmp_path / "out") == expected
    assert listing.splits["train"][1].where.endswith("/n0.tar/n0_2.JPEG")


def test_class_tars_may_be_validated_on_and_have_folders_for_it(forms: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(forms / "class_tars", tmp_path / "source"))
    (source / "ILSVRC2012_img_val.tar").unlink()
    shutil.copytree(forms / "folders" / "val", source / "val")
    assert listed(source).fingerprint == listed(forms / "folders").fingerprint
    for folder in (forms / "folders" / "val").iterdir():
        tar = tar_of({file.name: file.read_bytes() for file in folder.iterdir()})
        (tmp_path / "val").mkdir(exist_ok=True)
        (tmp_path / "val" / f"{folder.name}.tar").write_bytes(tar)
    assert listed(source, tmp_path / "val").fingerprint == listed(source).fingerprint


@pytest.mark.parametrize(
    ("source", "labels"),
    [
        ("folders", None),
        ("tars", "tars/wnids.txt"),
        ("tars/ILSVRC2012_img_train.tar", "tars/wnids.txt"),
        ("class_tars", "class_tars/wnids.txt"),
        ("inside", "inside/wnids.txt"),
    ],
)
def test_s3_gives_the_bytes_that_a_disk_gives(
    expected: dict[str, bytes], bucket: str, tmp_path: Path, source: str, labels: str | None
) -> None:
    def at(path: str) -> str:
        return f"s3://bucket/{path}{bucket}"

    val = at("tars/ILSVRC2012_img_val.tar") if source.endswith(".tar") else None
    listing = listed(at(source), val, None if labels is None else at(labels))
    assert made(listing, tmp_path / "out") == expected
    assert listing.roots[0].startswith(f"s3://bucket/{source}")
    assert "endpoint" not in "".join(listing.roots) + "".join(entry.where for entry in listing.splits["train"])


@pytest.mark.parametrize(("source", "labels"), [("folders", None), ("class_tars", "class_tars/wnids.txt")])
def test_googles_store_gives_the_bytes_that_a_disk_gives(
    expected: dict[str, bytes], google: str, tmp_path: Path, source: str, labels: str | None
) -> None:
    def at(path: str) -> str:
        return f"gs://anonymous@bucket/{path}{google}"

    listing = listed(at(source), labels=None if labels is None else at(labels))
    assert made(listing, tmp_path / "out") == expected
    assert listing.roots[0].startswith(f"gs://bucket/{source}")


def test_shards_give_the_same_bytes_from_a_disk_s3_and_http(forms: Path, bucket: str, tmp_path: Path) -> None:
    reference = made(listed(forms / "shards"), tmp_path / "disk")
    assert made(listed(f"s3://bucket/shards{bucket}"), tmp_path / "s3") == reference
    with serving(forms / "shards") as server:
        listing = listed(f"{server.url}/train/x-{{00..01}}.tar", f"{server.url}/val/x-{{00..01}}.tar")
        assert made(listing, tmp_path / "http") == reference
    assert made(
        listed(forms / "shards" / "train" / "x-{00..01}.tar", forms / "shards" / "val"), tmp_path / "braces"
    ) == (reference)


def test_http_gives_the_bytes_that_a_disk_gives(forms: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    with serving(forms / "tars") as server:
        train, val = (f"{server.url}/ILSVRC2012_img_{split}.tar?signature=secret" for split in ("train", "val"))
        listing = listed(train, val, f"{server.url}/wnids.txt")
        # What went to a worker finds its way by itself.
        plan = SetPlan(listing, encoder_settings(90), 0, 5, tuple(plan_shards(listing, 0, 5)))
        claim_folder(tmp_path / "out", plan)
        sent = [pickle.loads(pickle.dumps(shard)) for shard in plan.shards]
        built = [build_shard(tmp_path / "out", shard, plan.image, True) for shard in sent]
        finish(tmp_path / "out", plan, built, 0.0)
    files = {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert files == expected
    assert all("secret" not in entry.where for entry in listing.splits["val"])


def test_a_single_shard_is_a_source(forms: Path) -> None:
    for source in (forms / "shards" / "train" / "x-00.tar",):
        assert listed(source).images == 6
    with serving(forms / "shards" / "train") as server:
        assert listed(f"{server.url}/x-00.tar").fingerprint == listed(source).fingerprint


# What reading costs.


def test_listing_a_tar_reads_through_near_headers_and_jumps_over_far_ones(tmp_path: Path) -> None:
    near = {f"{i:04d}.jpg": bytes(1000) for i in range(2000)}
    far = {f"{i}.jpg": bytes(5_000_000) for i in range(4)}
    (tmp_path / "near.tar").write_bytes(tar_of({"a.tar": tar_of(near), "b.tar": tar_of(near)}))
    (tmp_path / "far.tar").write_bytes(tar_of({"a.tar": tar_of(far), "b.tar": tar_of(far)}))
    size = {name: (tmp_path / f"{name}.tar").stat().st_size for name in ("near", "far")}
    with serving(tmp_path) as server:
        assert listed(f"{server.url}/near.tar").images == 4000
        assert server.requests < 30
        assert server.bytes < 2.2 * size["near"]
        server.requests = server.bytes = 0
        assert listed(f"{server.url}/far.tar").images == 8
        assert server.bytes < 0.03 * size["far"]


@pytest.mark.parametrize("at_a_url", [False, True])
def test_class_tars_are_listed_at_the_same_time(forms: Path, at_a_url: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(3)
    true = tree.members_in

    def members_in(file: Any) -> Any:
        if file.tar.inside:
            together.wait(timeout=30)
        return true(file)

    monkeypatch.setattr(tree, "members_in", members_in)
    with serving(forms / "tars") as server:
        folder = server.url if at_a_url else forms / "tars"
        assert listed(f"{folder}/ILSVRC2012_img_train.tar", forms / "folders" / "val").images == 18


def test_an_image_in_a_tar_costs_one_request_for_its_own_bytes(forms: Path) -> None:
    with serving(forms / "tars") as server:
        location = f"{server.url}/ILSVRC2012_img_train.tar"
        entries = listed(location, forms / "folders" / "val").splits["train"]
        entry = entries[5]
        read_bytes(entry.path, entry.offset, entry.size)
        server.requests = server.bytes = 0
        data = read_bytes(entry.path, entry.offset, entry.size)
        assert (server.requests, server.bytes) == (1, entry.size)
        assert data == (forms / "folders" / "train" / entry.wnid / Path(entry.member).name).read_bytes()


def test_images_are_read_ahead_in_order_and_their_errors_come_in_their_place(forms: Path) -> None:
    with serving(forms / "tars") as server:
        entries = listed(f"{server.url}/ILSVRC2012_img_train.tar", forms / "folders" / "val").splits["train"]

        def read(entry: object) -> bytes:
            if entry == entries[3]:
                raise SourceReadError("no")
            return read_bytes(entry.path, entry.offset, entry.size)  # type: ignore[attr-defined]

        seen = []
        for entry, get in readings(entries, read):
            if entry == entries[3]:
                with pytest.raises(SourceReadError):
                    get()
            else:
                assert len(get()) == entry.size
            seen.append(entry)
    assert seen == list(entries)


# What can go wrong.


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.retry.FIRST_WAIT_S", 0.001)


@pytest.mark.usefixtures("impatient")
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
            build_shard(tmp_path / "out", shard, encoder_settings(90), set_aside=True)
    # The server is gone altogether; so would be the tar, which is no fault of each image in it either.
    with pytest.raises(SourceReadError):
        build_shard(tmp_path / "out", shard, encoder_settings(90), set_aside=True)
    with serving(tmp_path) as server, pytest.raises(FileNotFoundError) as missing:
        read_bytes(f"{server.url}/nothing.tar", 0, 10)
    assert missing.value.errno == errno.ENOENT
    assert not list((tmp_path / "out").rglob("*.json"))


def test_a_missing_object_is_the_files_fault(forms: Path, bucket: str, s3: str, tmp_path: Path) -> None:
    listing = listed(f"s3://bucket/folders{bucket}")
    boto3.client("s3", endpoint_url=f"http://{s3}").delete_object(Bucket="bucket", Key="folders/train/n1/n1_2.JPEG")
    image = encoder_settings(90)
    plan = SetPlan(listing, image, 0, 100, tuple(plan_shards(listing, 0, 100)))
    claim_folder(tmp_path / "out", plan)
    built = [build_shard(tmp_path / "out", shard, image, set_aside=True) for shard in plan.shards]
    finish(tmp_path / "out", plan, built, 0.1)
    (line,) = (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] == "s3://bucket/folders/train/n1/n1_2.JPEG"
    assert "No such file" in json.loads(line)["reason"]


def test_a_server_without_ranges_is_named(forms: Path) -> None:
    with (
        serving(forms / "tars", ranges=False) as server,
        pytest.raises(NoRangesError, match=r"ILSVRC2012_img_train\.tar cannot be read in place: .*range"),
    ):
        listed(f"{server.url}/ILSVRC2012_img_train.tar")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "is no tar, and HTTP cannot list folders: give --source http://HOST/NAME.tar, or shards as"),
        ("/nothing.tar", "No such file or directory: 'http://.*/nothing.tar'"),
        ("/x-{00..02}.tar", "No such file or directory: 'http://.*/x-02.tar'"),
        ("/text.tar", "is no whole tar .*: give a tar"),
    ],
)
def test_a_bad_http_source_is_named(forms: Path, tmp_path: Path, path: str, message: str) -> None:
    for tar in (forms / "shards" / "train").iterdir():
        shutil.copy(tar, tmp_path)
    (tmp_path / "text.tar").write_text("text\n" * 1000)
    with serving(tmp_path) as server, pytest.raises((SourceError, OSError), match=message):
        listed(f"{server.url}{path}")


def test_a_bad_s3_source_is_named(bucket: str) -> None:
    with pytest.raises(SourceError, match=r"s3://bucket/nothing does not exist: give --source"):
        listed(f"s3://bucket/nothing{bucket}")
    with pytest.raises(ValueError, match="strange://x cannot be opened"):
        listed("strange://x")


def test_locations_are_escaped_and_shown_without_secrets() -> None:
    location = child("s3://key:secret@bucket/a%20b?region=x", "c d?.jpg")
    assert location == "s3://key:secret@bucket/a%20b/c%20d%3F.jpg?region=x"
    assert shown(location) == "s3://bucket/a b/c d?.jpg"
    assert shown("/a?b") == "/a?b"
