"""A listing stored beside the set that is made of it, so that no later command reads the source's headers again.

`listing.arrow` is an Arrow stream, a row an image, with the sha256 of that stream behind it. It is taken if the command
line and the code are the same and `walk` finds the same files: in a folder their names, sizes and times. Of a folder of
images that is nearly all of what listing it costs, and nothing cheaper finds a file that was overwritten in place; so
sources of more than MANY files are listed anew each time. While tars are being listed, those that are done are stored
now and then, and a listing that was interrupted goes on. No location is stored, as those of URLs may hold keys.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.sources.file_table import FileTable, Holder
from pipeline.sources.files import FileState
from pipeline.sources.listing import Entries, Listing
from pipeline.sources.tree import Branch, Tree, read_all, walk
from pipeline.sources.webdatasets import Samples
from pipeline.storage.locations import Location, is_url, join, parent, shown
from pipeline.storage.remote import read, write

LISTING_FILE = "listing.arrow"
WORTH = 1000  # Images. A smaller source is listed anew each time.
MANY = 100_000  # Files that are looked at.
EVERY_S = 15.0  # While tars are being listed.
_DIGEST_BYTES = 32


class ListingStore:
    """The stored listing in a set's folder, for one command line."""

    def __init__(self, root: Location, report: Callable[[str], None]) -> None:
        """
        Args:
            root: the set's folder, which need not be there, or URL.
            report: told why a stored listing is not used.
        """
        self._location = join(root, LISTING_FILE)
        self._report = report
        self._tars: dict[str, Tree] = {}

    def find(self, places: Sequence[str | None], *more: Any) -> Listing | None:
        """The stored listing; None if there is none, or it is damaged or of another state of the source.

        Args:
            places: every location that the command line gives.
            more: what else the listing depends on.

        Raises:
            OSError: if it cannot be read.
        """
        given = [place for place in places if place is not None]
        # The names of shards' classes lie beside them or above: see `names_beside`.
        above = [join(folder, "dataset.json") for place in given for folder in (parent(place), parent(parent(place)))]
        files = (one for place in (*given, *above) for one in walk(place))
        # What cannot be looked at, the listing may not need.
        try:
            found = list(itertools.islice(files, MANY + 1))
        except OSError:
            found = [("", "")]
        self._places = [place for place, _ in found]
        code = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
        seen = [[shown(place), state] for place, state in found]
        key = json.dumps([hashlib.sha256(code).hexdigest(), [place and shown(place) for place in places], more, seen])
        self._key = hashlib.sha256(key.encode()).hexdigest()
        self._known = len(found) <= MANY and all(state for _, state in found)
        self._written = time.monotonic()
        try:
            data = read(self._location)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            rows, head = _unpack(data)
            if head["key"] == self._key:
                return self._restored(rows, head)
            self._report("the source has changed, or the command line, since it was listed: listing it anew")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, pa.ArrowException) as error:
            self._report(f"{shown(self._location)} is damaged ({type(error).__name__}): listing the source anew")
        return None

    def read_all(self, branches: Sequence[Branch]) -> Iterator[Tree]:
        """What lies in each, as `tree.read_all`; the tars that are done are stored now and then."""
        for branch in branches:
            branch.kept = branch.kept or self._tars.get(branch.where)
        for tree in read_all(branches):
            if tree.is_tar and not tree.below and len(_files_of(tree)):
                self._tars[tree.where] = tree
            yield tree
            if time.monotonic() - self._written >= EVERY_S:
                self._store_tars()

    def save(self, listing: Listing) -> None:
        """Stores a whole listing, unless it is small."""
        splits = listing.splits.items()
        if listing.images >= WORTH:
            self._write(
                FileTable.joined([entries.files for _, entries in splits]),
                [entries.labels for _, entries in splits],
                listing=[listing.roots, listing.classes, listing.notes, listing.fingerprint],
                splits=[(name, len(entries), list(entries.renamed.items())) for name, entries in splits],
            )

    def _store_tars(self) -> None:
        tars = self._tars.values()
        self._write(
            FileTable.joined([_files_of(tar) for tar in tars]),
            [tar.samples.labels if tar.samples else np.zeros(len(tar.images)) for tar in tars],
            tars=[
                (tar.where, len(_files_of(tar)), tar.others, tar.archives, tar.samples and list(tar.samples.named))
                for tar in tars
            ],
        )

    def _write(self, files: FileTable, labels: Sequence[NDArray[Any]], **head: Any) -> None:
        rank = {place: number for number, place in enumerate(self._places)}
        # What has come since it was looked at, the next look finds.
        if not self._known or any(holder.path not in rank for holder in files.holders):
            return
        head["key"] = self._key
        head["holders"] = [(rank[path], inside, state) for path, inside, state in files.holders]
        rows = files.to_arrow(np.concatenate(labels).astype(np.int32))
        sink = pa.BufferOutputStream()
        rows = rows.replace_schema_metadata({"head": json.dumps(head)})
        with pa.ipc.new_stream(sink, rows.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as stream:
            stream.write_batch(rows)
        data = sink.getvalue().to_pybytes()
        try:
            if not is_url(self._location):
                os.makedirs(parent(self._location), exist_ok=True)
            write(self._location, data + hashlib.sha256(data).digest())
        except OSError as error:
            self._report(f"{shown(self._location)} cannot be written, the next command lists the source anew: {error}")
        self._written = time.monotonic()

    def _restored(self, rows: pa.RecordBatch, head: dict[str, Any]) -> Listing | None:
        """What was stored: a listing; or tars, which are kept for `read_all`."""
        holders = [
            Holder(self._places[rank], inside, None if state is None else FileState(*state))
            for rank, inside, state in head["holders"]
        ]
        files, labels = FileTable.from_arrow(holders, rows), rows["label"].to_numpy()
        start = 0
        for where, count, others, archives, named in head.get("tars", ()):
            mine = np.arange(start, start := start + count)
            table = files.take(mine)
            tree = Tree(where, parent(table.holders[0].path), others=others, archives=tuple(archives), is_tar=True)
            if named is None:
                self._tars[where] = replace(tree, images=table)
            else:
                pairs = frozenset((label, name) for label, name in named)
                samples = Samples(where, table, labels[mine].astype(np.int64), pairs, others)
                self._tars[where] = replace(tree, samples=samples)
        if "listing" not in head:
            return None
        roots, classes, notes, fingerprint = head["listing"]
        splits = {}
        for name, count, renamed in head["splits"]:
            keys = {start + row: key for row, key in renamed}
            mine = np.arange(start, start := start + count)
            splits[name] = Entries(files, labels, dict(enumerate(classes)), keys, mine)
        listing = Listing(tuple(roots), tuple(classes), splits, tuple(notes))
        vars(listing)["fingerprint"] = fingerprint
        return listing


def _unpack(data: bytes) -> tuple[pa.RecordBatch, dict[str, Any]]:
    """The rows and what is said of them."""
    stream = memoryview(data)[:-_DIGEST_BYTES]
    if hashlib.sha256(stream).digest() != data[-_DIGEST_BYTES:]:
        raise ValueError("its digest does not match")
    with pa.ipc.open_stream(stream) as reader:
        rows = reader.read_next_batch()
    rows.validate(full=True)
    return rows, json.loads(rows.schema.metadata[b"head"])


def _files_of(tar: Tree) -> FileTable:
    return tar.samples.files if tar.samples else tar.images
