"""Going through the headers of tars far away: few requests where one goes alone, few bytes where many go at once."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from pipeline.sources.files import read_bytes
from pipeline.storage import remote
from pipeline.storage.remote import NEAR, PEEK, ReadAhead
from tests.range_server import serving

HEADERS = 500


@pytest.mark.parametrize(
    ("others", "step", "reads_on"),
    [
        (0, 1_500, True),
        # The validation tar of ImageNet, and one class tar of many.
        (0, 110_000, True),
        (63, 110_000, False),
        (63, 20_000, True),
        (63, 1_500, True),
        (0, 5_000_000, False),
    ],
)
def test_it_reads_on_over_what_is_near_for_so_many(
    monkeypatch: pytest.MonkeyPatch, others: int, step: int, reads_on: bool
) -> None:
    lengths: list[int] = []

    def read_range(url: str, offset: int, length: int) -> bytes:
        lengths.append(length)
        return bytes(length)

    monkeypatch.setattr(remote, "read_range", read_range)
    monkeypatch.setattr(ReadAhead, "_at_work", set())
    beside = [ReadAhead("http://host/y.tar", NEAR) for _ in range(others)]
    with contextlib.closing(ReadAhead("http://host/x.tar", HEADERS * step)) as file:
        for number in range(HEADERS):
            assert file.read_at(number * step, 512) == bytes(512)
    for one in beside:
        one.close()
    assert not ReadAhead._at_work
    if reads_on:
        assert len(lengths) < HEADERS * step / NEAR + 30
    else:
        assert len(lengths) == HEADERS
        assert sum(lengths) == HEADERS * PEEK


def test_of_open_files_those_used_last_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "OPEN_FILES", 2)
    monkeypatch.setattr(remote, "_free", type(remote._free)())
    for name in "abc":
        (tmp_path / name).write_bytes(b"x" * 100)
    with serving(tmp_path) as server:

        def requests(name: str) -> int:
            server.requests = 0
            assert read_bytes(f"{server.url}/{name}", 10, 5) == b"xxxxx"
            return server.requests

        assert [requests(name) for name in "ababcbcaca"] == [2, 2, 1, 1, 2, 1, 1, 2, 1, 1]
