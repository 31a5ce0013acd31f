"""A server on this machine that shows the faults which a real one cannot be made to show."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# Takes what was asked (path, body) and answers: status, headers, bytes; or a fault by its name.
Answer = tuple[int, dict[str, str], bytes] | str
Script = Callable[[str, dict[str, Any]], Answer]


def said(body: Any, status: int = 200, **headers: str) -> Answer:
    """An answer of JSON."""
    return status, headers, json.dumps(body).encode()


class FaultServer:
    """What was asked, in order, and how many requests were under way at once."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.asked: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        self.url = ""
        self.is_over = False
        self.num_flooded = 0


@contextlib.contextmanager
def serving(script: Script, port: int = 0) -> Iterator[FaultServer]:
    """Run a server while the block lasts.

    Faults: "hang" (no answer), "drop" (the connection is closed), "half" (the connection is closed
    in the middle of the answer), "torn" (a whole answer of half a JSON text), "drip" and "drip
    headers" (byte by byte, without an end), "flood" (an answer without an end).
    """
    server = FaultServer(script)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.answer()

        def answer(self) -> None:
            raw = self.rfile.read(int(self.headers.get("content-length", 0)))
            body = json.loads(raw) if raw else {}
            with server.lock:
                server.asked.append((self.path, body, dict(self.headers)))
                server.in_flight += 1
                server.most_in_flight = max(server.most_in_flight, server.in_flight)
            found = server.script(self.path, body)
            with server.lock:
                server.in_flight -= 1
            if isinstance(found, str):
                self.fault(found)
                return
            status, headers, data = found
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(data)

        def fault(self, name: str) -> None:
            self.close_connection = True
            if name == "hang":
                time.sleep(1.0)
            elif name in ("half", "torn"):
                data = b'{"choices": [{"text": "4'
                self.send_response(200)
                self.send_header("Content-Length", str(len(data) + 50 * (name == "half")))
                self.end_headers()
                self.wfile.write(data)
            elif name.startswith("drip"):
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
                if name == "drip":
                    self.wfile.write(b"1\r\nContent-Length: 1000000\r\n\r\n")
                while not server.is_over:
                    self.wfile.write(b" ")
                    time.sleep(0.02)
            elif name == "flood":
                self.send_response(200)
                self.send_header("Content-Length", str(2**40))
                self.end_headers()
                while not server.is_over:
                    self.wfile.write(b" " * 2**16)
                    server.num_flooded += 2**16

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            pass

    with Quiet(("127.0.0.1", port), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.is_over = True
            http.shutdown()
            thread.join()
