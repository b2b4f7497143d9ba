"""A stored listing: what listing anew gives, without reading a header, and only while the source is as it was."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import boto3
import pytest

from pipeline.sources import stored_listing, tree
from pipeline.sources.listing import Listing
from pipeline.sources.sources import read_source
from pipeline.sources.stored_listing import LISTING_FILE, ListingStore
from tests.photographs import write_source
from tests.range_server import serving
from tests.sources.test_tar_sources import tar_of, tar_of_tars

FORMS = {
    "tar of tars": ("train.tar", "val.tar", "wnids.txt"),
    "class tars": ("class_tars", None, None),
    "shards": ("shards", None, None),
    "pattern": ("shards/train/x-{00..02}.tar", "shards/val", None),
    "folders": ("folders", None, None),
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_listing, "WORTH", 0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The same images in every form."""
    root = tmp_path / "source"
    train, val = write_source(root / "folders" / "train", images=4, longest=64), root / "folders" / "val"
    write_source(val, images=2, longest=64, first_seed=50)
    (root / "train.tar").write_bytes(tar_of_tars(train))
    images = {f"{folder.name}_{file.name}": file for folder in sorted(val.iterdir()) for file in folder.iterdir()}
    (root / "val.tar").write_bytes(tar_of({name: images[name].read_bytes() for name in sorted(images)}))
    (root / "wnids.txt").write_text("".join(f"{name.partition('_')[0]}\n" for name in sorted(images)))
    for split, folder in (("train", train), ("val", val)):
        (root / "class_tars" / split).mkdir(parents=True)
        (root / "shards" / split).mkdir(parents=True)
        for label in range(3):
            files = {file.name: file.read_bytes() for file in sorted((folder / f"n{label}").iterdir())}
            (root / "class_tars" / split / f"n{label}.tar").write_bytes(tar_of({**files, "notes.txt": b"?"}))
            samples: dict[str, bytes] = {}
            for name, data in files.items():
                samples |= {f"{Path(name).stem}.jpg": data, f"{Path(name).stem}.cls": str(label).encode()}
            (root / "shards" / split / f"x-{label:02d}.tar").write_bytes(tar_of(samples))
    return root


def listed(
    source: str | Path, form: str, out: str | Path | None, options: str = "", said: list[str] | None = None
) -> Listing:
    def at(name: str | None) -> str | None:
        return None if name is None else f"{source}/{name}{options}"

    store = None if out is None else ListingStore(out, lambda line: (said if said is not None else []).append(line))
    place, val, labels = (at(name) for name in FORMS[form])
    assert place is not None
    return read_source(place, val, 0.25, 0, labels, None, store)


def same(one: Listing, other: Listing) -> bool:
    splits = [{name: list(entries) for name, entries in x.splits.items()} for x in (one, other)]
    parts = [(x.roots, x.classes, x.notes, x.fingerprint, splits[i]) for i, x in enumerate((one, other))]
    states = [[entries.tar_states for entries in x.splits.values()] for x in (one, other)]
    return parts[0] == parts[1] and states[0] == states[1]


@pytest.fixture
def headers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tars whose headers are read."""
    read: list[str] = []

    def members_in(file: Any) -> Any:
        read.append(file.tar.where)
        return true(file)

    true = tree.members_in
    monkeypatch.setattr(tree, "members_in", members_in)
    return read


@pytest.mark.parametrize("form", FORMS)
def test_what_is_stored_is_what_listing_gives(source: Path, tmp_path: Path, form: str, headers: list[str]) -> None:
    first = listed(source, form, tmp_path / "out")
    assert same(first, listed(source, form, None))
    headers.clear()
    said: list[str] = []
    assert same(listed(source, form, tmp_path / "out", said=said), first)
    assert (headers, said) == ([], [])
    # Another question.
    assert listed(source, "folders" if form != "folders" else "class tars", tmp_path / "out").roots != first.roots


def newer(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


CHANGES = {
    "newer tar": ("tar of tars", lambda root: newer(root / "train.tar")),
    "newer validation tar": ("tar of tars", lambda root: newer(root / "val.tar")),
    "other labels": ("tar of tars", lambda root: newer(root / "wnids.txt")),
    "newer class tar": ("class tars", lambda root: newer(root / "class_tars" / "train" / "n1.tar")),
    "new class tar": (
        "class tars",
        lambda root: shutil.copy(root / "class_tars" / "train" / "n1.tar", root / "class_tars" / "train" / "n7.tar"),
    ),
    "class names": (
        "shards",
        lambda root: (root / "shards" / "dataset.json").write_text(
            '{"classes": [{"wnid": "a"}, {"wnid": "b"}, {"wnid": "c"}]}'
        ),
    ),
    "class names of a pattern": (
        "pattern",
        lambda root: (root / "shards" / "dataset.json").write_text(
            '{"classes": [{"wnid": "a"}, {"wnid": "b"}, {"wnid": "c"}]}'
        ),
    ),
    "shard of a pattern": ("pattern", lambda root: newer(root / "shards" / "train" / "x-01.tar")),
    "image overwritten in place": (
        "folders",
        lambda root: (root / "folders" / "train" / "n1" / "n1_2.JPEG").write_bytes(b"another"),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_source_is_listed_anew(source: Path, tmp_path: Path, name: str) -> None:
    form, change = CHANGES[name]
    listed(source, form, tmp_path / "out")
    change(source)
    said: list[str] = []
    assert same(listed(source, form, tmp_path / "out", said=said), listed(source, form, None))
    assert said == ["the source has changed, or the command line, since it was listed: listing it anew"]
    listed(source, form, tmp_path / "out", said=said)
    assert len(said) == 1


def test_a_damaged_or_foreign_listing_is_made_anew(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "out" / LISTING_FILE
    right = listed(source, "tar of tars", file.parent)
    data = file.read_bytes()
    damaged = [data[:-1], data[: len(data) // 2], b"", b"of somebody else", tar_of({"x": b"x"})]
    damaged += [data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in range(0, len(data), len(data) // 20)]
    for wrong in damaged:
        file.write_bytes(wrong)
        said: list[str] = []
        assert same(listed(source, "tar of tars", file.parent, said=said), right)
        (line,) = said
        assert line.startswith(f"{file} is damaged (")
        assert file.read_bytes() == data


def test_it_lies_at_a_url_and_holds_no_secret(
    source: Path, s3: str, headers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = boto3.client("s3", endpoint_url=f"http://{s3}")
    client.create_bucket(Bucket="bucket")
    for path in source.rglob("*.*"):
        client.upload_file(str(path), "bucket", str(path.relative_to(source)))
    options = f"?region=us-east-1&scheme=http&endpoint_override={s3}"
    out = f"s3://KEY:SECRET@bucket/sets/out{options}"
    for form in FORMS:
        first = listed("s3://USER:SECRET@bucket", form, out, options)
        stored = client.get_object(Bucket="bucket", Key=f"sets/out/{LISTING_FILE}")["Body"].read()
        assert not any(word in stored for word in (b"USER", b"SECRET", b"endpoint"))
        headers.clear()
        again = listed("s3://USER:SECRET@bucket", form, out, options)
        assert same(again, first)
        assert [entry.path for entry in again.splits["train"]] == [entry.path for entry in first.splits["train"]]
        assert headers == []
    client.upload_file(str(source / "class_tars/train/n1.tar"), "bucket", "class_tars/train/n7.tar")
    said: list[str] = []
    listed("s3://bucket", "folders", out, options, said)
    assert said == []
    listed("s3://bucket", "class tars", out, options)
    client.upload_file(str(source / "class_tars/train/n1.tar"), "bucket", "class_tars/train/n8.tar")
    assert "n8" in listed("s3://bucket", "class tars", out, options, said).classes
    assert said == ["the source has changed, or the command line, since it was listed: listing it anew"]


def test_a_web_servers_tar_is_known_by_its_etag(source: Path, tmp_path: Path, headers: list[str]) -> None:
    with serving(source) as server:
        first = listed(server.url, "tar of tars", tmp_path / "out", "?signature=1")
        headers.clear()
        again = listed(server.url, "tar of tars", tmp_path / "out", "?signature=2")
        assert headers == []
        assert again.fingerprint == first.fingerprint
        assert next(iter(again.splits["train"])).path.endswith("/train.tar?signature=2")
        newer(source / "train.tar")
        assert listed(server.url, "tar of tars", tmp_path / "out").fingerprint == first.fingerprint
        assert headers
        server.etags = False
        (tmp_path / "out" / LISTING_FILE).unlink()
        listed(server.url, "tar of tars", tmp_path / "out")
        assert not (tmp_path / "out" / LISTING_FILE).exists()


@pytest.mark.parametrize("form", ["tar of tars", "class tars", "shards", "pattern"])
def test_an_interrupted_listing_goes_on(
    source: Path, tmp_path: Path, form: str, headers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = listed(source, form, None)
    monkeypatch.setattr(stored_listing, "EVERY_S", 0.0)
    counted = tree.members_in

    def interrupted(file: Any) -> Any:
        if file.tar.where.endswith(("n2.tar", "train/x-02.tar")):
            raise OSError("the network is gone")
        return counted(file)

    monkeypatch.setattr(tree, "members_in", interrupted)
    with pytest.raises(OSError, match="the network is gone"):
        listed(source, form, tmp_path / "out")
    monkeypatch.setattr(tree, "members_in", counted)
    headers.clear()
    said: list[str] = []
    assert same(listed(source, form, tmp_path / "out", said=said), right)
    assert said == []
    done = ("train.tar/n0.tar", "train.tar/n1.tar", "train/n0.tar", "train/n1.tar", "train/x-00.tar", "train/x-01.tar")
    assert not any(where.endswith(done) for where in headers)
    assert any(where.endswith(("n2.tar", "train/x-02.tar")) for where in headers)
    headers.clear()
    assert same(listed(source, form, tmp_path / "out"), right)
    assert headers == []
    # What was stored half way is of no use once a tar has changed.
    (tmp_path / "out" / LISTING_FILE).unlink()
    monkeypatch.setattr(tree, "members_in", interrupted)
    with pytest.raises(OSError, match="the network is gone"):
        listed(source, form, tmp_path / "out")
    monkeypatch.setattr(tree, "members_in", counted)
    newer(
        source
        / {"tar of tars": "train.tar", "class tars": "class_tars/train/n1.tar"}.get(form, "shards/train/x-01.tar")
    )
    headers.clear()
    assert same(listed(source, form, tmp_path / "out"), listed(source, form, None))
    assert any(where.endswith(("n1.tar", "train/x-01.tar")) for where in headers)
