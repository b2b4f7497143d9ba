"""A web server on loopback that serves files by ranges, counts what it does, and fails on demand."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


class RangeServer(ThreadingHTTPServer):
    """Serves the files under `root`."""

    daemon_threads = True

    def __init__(self, root: Path, ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.ranges = ranges
        self.etags = True
        """Whether a file's answers say when it is another file."""
        self.requests = 0
        """How many GETs and HEADs came."""
        self.bytes = 0
        """How many bytes of files went out."""
        self.failures: list[int] = []
        """Answers to give to the next GETs instead of the file: a status, or 0 for half the bytes."""
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: RangeServer

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = self.server.root / unquote(self.path.partition("?")[0]).lstrip("/")
        with self.server.lock:
            self.server.requests += 1
            failure = self.server.failures.pop() if with_body and self.server.failures else None
        if failure or not path.is_file():
            self.send_response(failure or 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start, end = 0, path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if self.server.ranges else None
        if asked:
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {asked[1]}-{asked[2]}/{end}")
            start, end = int(asked[1]), min(end, int(asked[2]) + 1)
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(end - start))
        if self.server.etags:
            self.send_header("ETag", f'"{path.stat().st_mtime_ns:x}-{path.stat().st_size:x}"')
        self.end_headers()
        if with_body:
            with path.open("rb") as file:
                file.seek(start)
                data = file.read(end - start)
            if failure == 0:
                data = data[: len(data) // 2]
                self.close_connection = True
            # Before they go: whoever has them may look at the count.
            with self.server.lock:
                self.server.bytes += len(data)
            # Who wanted the first bytes alone hangs up.
            with contextlib.suppress(ConnectionError):
                self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@contextlib.contextmanager
def serving(root: Path, ranges: bool = True) -> Iterator[RangeServer]:
    """A server at work."""
    server = RangeServer(root, ranges)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
