"""A server of objects on loopback that answers ranges as RFC 9110 has it, counts what it sends, and fails on request."""

from __future__ import annotations

import http.server
import re
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

RANGE = re.compile(r"bytes=(\d*)-(\d*)$")


class Sent(NamedTuple):
    """One answer."""

    path: str
    status: int
    start: int
    nbytes: int


class Server:
    """Objects by path.

    Attributes:
        objects: bytes of each path; may be changed at any time.
        most_open: answers that were being made at a time; one that a client has already may be among them.
        log: every answer; `clear()` it before what is to be counted.
        fault: given the number of a request, what is wrong with the answer to it: None, "503", "reset" (no answer), "cut"
            (half of the body), "slow", or a status.
        headers: that a request must have had, or the answer is 403.
        ranges: False answers with the whole object, as simple servers do.
        etags: whether objects have one, and a condition on it is looked at.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.log: list[Sent] = []
        self.fault: Callable[[int], Any] = lambda number: None
        self.headers: dict[str, str] = {}
        self.ranges = True
        self.etags = True
        self.asked = 0
        self.open = self.most_open = 0
        self.lock = threading.Lock()
        self.url = ""

    @property
    def nbytes(self) -> int:
        return sum(sent.nbytes for sent in self.log)

    def etag(self, path: str) -> str:
        return f'"{zlib.crc32(self.objects[path]):08x}"'


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Nothing: standard error is the tests'."""

        def do_GET(self) -> None:
            with server.lock:
                number, server.asked = server.asked, server.asked + 1
                server.open += 1
                server.most_open = max(server.most_open, server.open)
            try:
                self.answer(number)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                with server.lock:
                    server.open -= 1

        def do_HEAD(self) -> None:
            text = server.objects.get(self.path.partition("?")[0])
            self.send_response(404 if text is None else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(text or b"")))
            self.end_headers()

        def answer(self, number: int) -> None:
            fault = server.fault(number)
            path = self.path.partition("?")[0]
            if fault == "reset":
                # With a linger of no time, closing is a reset.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
                return
            if fault == "slow":
                time.sleep(0.15)
            if fault == "503" or isinstance(fault, int):
                self.status(503 if fault == "503" else fault)
                return
            if any(self.headers.get(name) != value for name, value in server.headers.items()):
                self.status(403)
                return
            text = server.objects.get(path)
            if text is None:
                self.status(404)
                return
            etag = server.etag(path) if server.etags else ""
            if etag and self.headers.get("If-Match", etag) != etag:
                self.status(412)
                return
            asked = RANGE.match(self.headers.get("Range", "")) if server.ranges else None
            start, end = 0, len(text)
            if asked is not None:
                first, last = asked.groups()
                start = int(first) if first else max(0, len(text) - int(last))
                end = min(len(text), int(last) + 1) if first and last else len(text)
                if start >= len(text):
                    self.status(416)
                    return
            body = text[start:end]
            self.send_response(206 if asked is not None else 200)
            if asked is not None:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(text)}")
            if etag:
                self.send_header("ETag", etag)
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if fault == "cut":
                body = body[: len(body) // 2]
                self.close_connection = True
            with server.lock:
                server.log.append(Sent(path, 206, start, len(body)))
            self.wfile.write(body)

        def status(self, status: int) -> None:
            with server.lock:
                server.log.append(Sent(self.path, status, 0, 0))
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

    class Threads(http.server.ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, *_: Any) -> None:
            """A client that went away."""

    httpd = Threads(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{httpd.server_address[1]}"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()
