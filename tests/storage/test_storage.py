"""URLs: what opens them, what of them is shown, and how few requests going through the headers of a tar takes."""

from __future__ import annotations

import contextlib

import pytest
from pyarrow import fs

from pipeline.storage import remote
from pipeline.storage.locations import child, open_location, shown
from pipeline.storage.remote import NEAR, PEEK, ReadAhead


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
