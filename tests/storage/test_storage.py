"""URLs: what opens them, what of them is shown, and how few requests going through the headers of a tar takes."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from pyarrow import fs

from pipeline.storage import remote
from pipeline.storage.locations import child, open_location, shown, without_keys
from pipeline.storage.remote import NEAR, PEEK, ReadAhead
from pipeline.storage.retry import SourceReadError
from tests import range_server


def test_azures_store_goes_by_pyarrows_scheme_and_others_are_refused_with_it() -> None:
    filesystem, path = open_location("abfs://images@account.dfs.core.windows.net/sets/train%20a.tar")
    assert isinstance(filesystem, fs.AzureFileSystem)
    assert path == "images/sets/train a.tar"
    for url in ("az://images/set?sas=SECRET", "azure://images/set?sas=SECRET"):
        with pytest.raises(ValueError, match=r"^az.*://images/set: for Azure give abfs://CONTAINER@") as found:
            open_location(url)
        assert "SECRET" not in str(found.value)


def test_locations_are_escaped_and_shown_without_secrets() -> None:
    location = child("s3://key:secret@bucket/a%20b?region=x", "c d?.jpg")
    assert location == "s3://key:secret@bucket/a%20b/c%20d%3F.jpg?region=x"
    assert shown(location) == "s3://bucket/a b/c d?.jpg"
    assert shown("/a?b") == "/a?b"


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        (
            "s3://KEY:SECRET@bucket/a%20b?region=x&SECRET=1&scheme=http&endpoint_override=h:9",
            "s3://bucket/a%20b?region=x&scheme=http&endpoint_override=h:9",
        ),
        ("https://host/set?sv=2024&sig=SECRET", "https://host/set"),
        ("abfs://images@a.dfs.core.windows.net/b?client_secret=SECRET", "abfs://images@a.dfs.core.windows.net/b"),
        ("abfs://images:SECRET@a.dfs.core.windows.net/b", "abfs://a.dfs.core.windows.net/b"),
    ],
)
def test_a_url_to_paste_keeps_where_it_is_and_no_key(url: str, kept: str) -> None:
    assert without_keys(url) == kept


@pytest.mark.parametrize("opens", [True, False])
def test_a_failure_by_http_shows_no_signature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opens: bool) -> None:
    (tmp_path / "a").write_bytes(bytes(100))
    monkeypatch.setattr(remote, "retry", lambda attempt, where, did: attempt())
    if not opens:
        monkeypatch.setattr(range_server._Handler, "do_HEAD", range_server._Handler.do_GET)
    with range_server.serving(tmp_path) as server:
        server.failures = [503] * 9
        with pytest.raises(SourceReadError, match="the server answers 503") as found:
            remote.read(f"{server.url}/a?sig=SECRET")
    assert "SECRET" not in str(found.value)


@pytest.mark.parametrize(
    ("others", "step", "reads_on"),
    [
        # The validation tar of ImageNet, and one class tar of many.
        (0, 110_000, True),
        (63, 110_000, False),
        (63, 20_000, True),
        (0, 5_000_000, False),
    ],
)
def test_headers_are_read_through_where_they_are_near_for_so_many_and_jumped_to_else(
    monkeypatch: pytest.MonkeyPatch, others: int, step: int, reads_on: bool
) -> None:
    headers = 500
    lengths: list[int] = []

    def read_range(url: str, offset: int, length: int) -> bytes:
        lengths.append(length)
        return bytes(length)

    monkeypatch.setattr(remote, "read_range", read_range)
    monkeypatch.setattr(ReadAhead, "_at_work", set())
    beside = [ReadAhead("http://host/y.tar", NEAR) for _ in range(others)]
    with contextlib.closing(ReadAhead("http://host/x.tar", headers * step)) as file:
        for number in range(headers):
            assert file.read_at(number * step, 512) == bytes(512)
    for one in beside:
        one.close()
    assert not ReadAhead._at_work
    if reads_on:
        assert len(lengths) < headers * step / NEAR + 30
    else:
        assert len(lengths) == headers
        assert sum(lengths) == headers * PEEK
