"""A proxy before an HTTP server that fails as networks and object stores do, in an order that a test lays down."""

from __future__ import annotations

import collections
import contextlib
import http.client
import socket
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
FORBIDDEN = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
FAULTS = ("reset", "503", "truncated", "flipped")


class FaultyProxy:
    """What is to go wrong, and what was asked.

    `plan[suffix]` is a queue of faults: each GET of a path that ends so takes the next, and passes when none is left.
    `write_plan[suffix]` is such a queue for PUTs and POSTs. `gets` counts GETs by path, `writes` has what was written.
    """

    def __init__(self, server: str) -> None:
        self.server = server
        self.address = ""
        self.plan: dict[str, collections.deque[str]] = {}
        self.gets: collections.Counter[str] = collections.Counter()
        self.write_plan: dict[str, collections.deque[str]] = {}
        self.writes: list[str] = []
        self.lock = threading.Lock()

    def next_fault(self, path: str) -> str:
        with self.lock:
            self.gets[path] += 1
            return _next(self.plan, path)

    def next_write_fault(self, path: str) -> str:
        with self.lock:
            self.writes.append(path)
            return _next(self.write_plan, path)


def _unchunked(stream: Any) -> bytes:
    data = b""
    while size := int(stream.readline().partition(b";")[0], 16):
        data += stream.read(size)
        stream.readline()
    # What trails, up to an empty line.
    while stream.readline().strip():
        pass
    return data


def _next(plan: dict[str, collections.deque[str]], path: str) -> str:
    for suffix, faults in plan.items():
        if path.endswith(suffix) and faults:
            return faults.popleft()
    return ""


@contextlib.contextmanager
def faulty_proxy(server: str) -> Iterator[FaultyProxy]:
    """A proxy before HOST:PORT, on a port of its own while in use."""
    proxy = FaultyProxy(server)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # It would hold back each short answer for 40 ms.

        def _answer(self) -> None:
            path = self.path.partition("?")[0]
            headers = dict(self.headers)
            sent = self._body(headers)
            fault = ""
            if self.command == "GET":
                fault = proxy.next_fault(path)
            elif self.command in ("PUT", "POST"):
                fault = proxy.next_write_fault(path)
            if fault == "reset":
                # Closing with nothing to linger for sends RST.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()
                return
            if fault == "503":
                self._send(503, {"Content-Type": "application/xml"}, SLOW_DOWN)
                return
            if fault == "403":
                self._send(403, {"Content-Type": "application/xml"}, FORBIDDEN)
                return
            upstream = http.client.HTTPConnection(proxy.server, timeout=30)
            upstream.request(self.command, self.path, sent or None, headers)
            answer = upstream.getresponse()
            body = answer.read()
            upstream.close()
            if fault == "flipped" and body:
                body = body[:-1] + bytes([body[-1] ^ 1])
            self._send(answer.status, dict(answer.getheaders()), body, cut=fault == "truncated")

        def _body(self, headers: dict[str, str]) -> bytes:
            """The bytes to pass on, without HTTP's chunks."""
            names = {name.lower(): name for name in headers}
            if "chunked" in headers.pop(names.get("transfer-encoding", ""), ""):
                return _unchunked(self.rfile)
            return self.rfile.read(int(headers.pop(names.get("content-length", ""), "0")))

        def _send(self, status: int, headers: dict[str, str], body: bytes, cut: bool = False) -> None:
            self.send_response_only(status)
            length = headers.get("Content-Length", headers.get("content-length", str(len(body))))
            for name, value in headers.items():
                if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                    self.send_header(name, value)
            self.send_header("Content-Length", length)
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection = self.close_connection or cut

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    # A client that was reset is no news.
    listener.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=listener.serve_forever, daemon=True)
    thread.start()
    proxy.address = f"127.0.0.1:{listener.server_address[1]}"
    try:
        yield proxy
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()
