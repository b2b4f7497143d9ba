"""A stored listing: what listing anew gives, without reading a header, and only while the source is as it was."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.sources import stored_listing, tree
from pipeline.sources.listing import Listing
from pipeline.sources.sources import read_source
from pipeline.sources.stored_listing import LISTING_FILE, ListingStore
from pipeline.storage import remote
from tests.range_server import serving
from tests.shard_sets import s3_options
from tests.sources.layouts import tar_of

# SOURCE, SOURCE_VAL and the labels of each form.
FORMS = {
    "tar of tars": ("tars/ILSVRC2012_img_train.tar", "tars/ILSVRC2012_img_val.tar", "tars/wnids.txt"),
    "class tars": ("inside", None, "inside/wnids.txt"),
    "shards": ("shards", None, None),
    "pattern": ("shards/train/x-{00..02}.tar", "shards/val", None),
    "folders": ("folders", None, None),
}
CHANGED = "the source has changed, or the command line, since it was listed: listing it anew"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_listing, "WORTH", 0)


@pytest.fixture
def source(forms: Path, tmp_path: Path) -> Path:
    """All forms, to change."""
    return Path(shutil.copytree(forms, tmp_path / "source"))


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


def listed(
    source: str | Path, form: str, out: str | Path | None, options: str = "", said: list[str] | None = None
) -> Listing:
    place, val, labels = (None if name is None else f"{source}/{name}{options}" for name in FORMS[form])
    lines: list[str] = [] if said is None else said
    assert place is not None
    return read_source(place, val, 0.25, 0, labels, None, None if out is None else ListingStore(out, lines.append))


def facts(listing: Listing) -> list[object]:
    entries = [(name, list(some), some.tar_states) for name, some in listing.splits.items()]
    return [listing.roots, listing.classes, listing.notes, listing.fingerprint, entries]


@pytest.mark.parametrize("form", FORMS)
def test_what_is_stored_is_what_listing_gives(forms: Path, tmp_path: Path, form: str, headers: list[str]) -> None:
    right = facts(listed(forms, form, None))
    assert facts(listed(forms, form, tmp_path / "out")) == right
    headers.clear()
    said: list[str] = []
    assert facts(listed(forms, form, tmp_path / "out", said=said)) == right
    assert (headers, said) == ([], [])
    # Another question.
    assert listed(forms, "folders" if form != "folders" else "class tars", tmp_path / "out").roots != right[0]


def newer(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


CHANGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "newer tar": ("tar of tars", lambda root: newer(root / "tars" / "ILSVRC2012_img_train.tar")),
    "other labels": ("tar of tars", lambda root: newer(root / "tars" / "wnids.txt")),
    "new class tar": (
        "class tars",
        lambda root: shutil.copy(root / "class_tars" / "n1.tar", root / "inside" / "train" / "n7.tar"),
    ),
    "shard of a pattern": ("pattern", lambda root: newer(root / "shards" / "train" / "x-01.tar")),
    "class names of a pattern": (
        "pattern",
        lambda root: (root / "shards" / "dataset.json").write_text(
            '{"classes": [{"wnid": "a"}, {"wnid": "b"}, {"wnid": "c"}]}'
        ),
    ),
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
    assert facts(listed(source, form, tmp_path / "out", said=said)) == facts(listed(source, form, None))
    assert said == [CHANGED]
    listed(source, form, tmp_path / "out", said=said)
    assert len(said) == 1


def test_a_folder_that_comes_while_the_source_is_listed_is_taken_and_not_stored(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_place(*given: str) -> tree.Tree:
        shutil.copytree(source / "folders" / "train" / "n1", source / "folders" / "train" / "n7")
        return tree.read_place(*given)

    monkeypatch.setattr("pipeline.sources.sources.read_place", read_place)
    assert "n7" in listed(source, "folders", tmp_path / "out").classes
    assert not (tmp_path / "out" / LISTING_FILE).exists()


def test_a_damaged_or_foreign_listing_is_made_anew(forms: Path, tmp_path: Path) -> None:
    file = tmp_path / LISTING_FILE
    right = facts(listed(forms, "tar of tars", tmp_path))
    data = file.read_bytes()
    damaged = [data[:-1], data[: len(data) // 2], b"", b"of somebody else", tar_of({"x": b"x"})]
    damaged += [data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in range(0, len(data), len(data) // 20)]
    for wrong in damaged:
        file.write_bytes(wrong)
        said: list[str] = []
        assert facts(listed(forms, "tar of tars", tmp_path, said=said)) == right
        (line,) = said
        assert line.startswith(f"{file} is damaged (")
        assert file.read_bytes() == data


def test_it_lies_at_a_url_and_holds_no_secret(forms: Path, bucket: str, client: Any, headers: list[str]) -> None:
    out = f"s3://KEY:SECRET@bucket/sets/out{bucket}"
    for form in ("folders", "shards", "class tars"):
        first = listed("s3://USER:SECRET@bucket", form, out, bucket)
        stored = client.get_object(Bucket="bucket", Key=f"sets/out/{LISTING_FILE}")["Body"].read()
        assert not any(word in stored for word in (b"USER", b"SECRET", b"endpoint"))
        headers.clear()
        said: list[str] = []
        again = listed("s3://USER:SECRET@bucket", form, out, bucket, said)
        assert facts(again) == facts(first)
        assert (headers, said) == ([], [])
    client.upload_file(str(forms / "class_tars" / "n1.tar"), "bucket", "inside/train/n7.tar")
    assert "n7" in listed("s3://bucket", "class tars", out, bucket, said).classes
    assert said == [CHANGED]


def test_a_web_servers_tar_is_known_by_its_etag(source: Path, tmp_path: Path, headers: list[str]) -> None:
    with serving(source) as server:
        first = listed(server.url, "tar of tars", tmp_path / "out", "?signature=1")
        headers.clear()
        again = listed(server.url, "tar of tars", tmp_path / "out", "?signature=2")
        assert headers == []
        assert again.fingerprint == first.fingerprint
        assert again.splits["train"][0].path.endswith("/ILSVRC2012_img_train.tar?signature=2")
        newer(source / "tars" / "ILSVRC2012_img_train.tar")
        assert listed(server.url, "tar of tars", tmp_path / "out").fingerprint == first.fingerprint
        assert headers
        server.etags = False
        (tmp_path / "out" / LISTING_FILE).unlink()
        listed(server.url, "tar of tars", tmp_path / "out")
        assert not (tmp_path / "out" / LISTING_FILE).exists()


def test_a_stores_file_of_another_size_is_another_though_it_is_written_in_the_same_second(s3: str, client: Any) -> None:
    versions = set()
    for size in range(4):
        client.put_object(Bucket="bucket", Key="x.tar", Body=bytes(size))
        versions.add(remote.version(f"s3://bucket/x.tar{s3_options(s3)}"))
    assert len(versions) == 4


# Interrupted at the third class, with the others stored.
LAST, DONE = ("n2.tar", "train/x-02.tar"), ("n0.tar", "n1.tar", "train/x-00.tar", "train/x-01.tar")


def interrupt(monkeypatch: pytest.MonkeyPatch, list_again: Callable[[], Listing]) -> None:
    monkeypatch.setattr(stored_listing, "EVERY_S", 0.0)
    counted = tree.members_in

    def interrupted(file: Any) -> Any:
        if file.tar.where.endswith(LAST):
            raise OSError("the network is gone")
        return counted(file)

    with monkeypatch.context() as patch:
        patch.setattr(tree, "members_in", interrupted)
        with pytest.raises(OSError, match="the network is gone"):
            list_again()


@pytest.mark.parametrize(
    ("form", "changed"),
    [
        ("tar of tars", "tars/ILSVRC2012_img_train.tar"),
        ("class tars", "inside/train/n1.tar"),
        ("pattern", "shards/train/x-01.tar"),
    ],
)
def test_an_interrupted_listing_goes_on_where_no_tar_has_changed(
    source: Path, tmp_path: Path, form: str, changed: str, headers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, said = tmp_path / "out", list[str]()
    right = facts(listed(source, form, None))
    interrupt(monkeypatch, lambda: listed(source, form, out))
    headers.clear()
    assert facts(listed(source, form, out, said=said)) == right
    assert said == []
    assert not any(where.endswith(DONE) for where in headers)
    assert any(where.endswith(LAST) for where in headers)
    headers.clear()
    assert facts(listed(source, form, out)) == right
    assert headers == []
    (out / LISTING_FILE).unlink()
    interrupt(monkeypatch, lambda: listed(source, form, out))
    newer(source / changed)
    assert facts(listed(source, form, out, said=said)) == facts(listed(source, form, None)) != right
    assert said == [CHANGED]


def test_an_interrupted_listing_of_remote_tars_takes_nothing_from_one_that_has_changed(
    bucket: str, client: Any, headers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(out: str | None = f"s3://bucket/out{bucket}", said: list[str] | None = None) -> Listing:
        return listed("s3://bucket", "class tars", out, bucket, said)

    said: list[str] = []
    right = facts(again(None))
    interrupt(monkeypatch, again)
    client.put_object(Bucket="bucket", Key="inside/train/n1.tar", Body=tar_of({"another.jpg": b"image"}))
    # What this process has open is the old one; the next command is another process.
    remote._free.clear()
    headers.clear()
    found = facts(again(said=said))
    assert any(where.endswith("n1.tar") for where in headers)
    assert found == facts(again(None)) != right
    assert said == [CHANGED]
    # Nothing has changed this time.
    client.delete_object(Bucket="bucket", Key=f"out/{LISTING_FILE}")
    interrupt(monkeypatch, again)
    headers.clear()
    assert facts(again(said=said)) == found
    assert not any(where.endswith(DONE) for where in headers)
    assert len(said) == 1
