"""Seeded HTTP server of one folder on loopback, with Range, that drops, stalls and answers 503 at random."""

from __future__ import annotations

import random
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


class FlakyServer(ThreadingHTTPServer):
    """Server that fails a share `trouble` of the requests, and counts them by kind."""

    daemon_threads = True

    def __init__(self, folder: Path, *, seed: int, trouble: float, stall_s: float):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.trouble, self.stall_s = folder, trouble, stall_s
        self.random, self.lock = random.Random(seed), threading.Lock()
        self.count = {"requests": 0, "bytes": 0, "503": 0, "drop": 0, "cut": 0, "stall": 0}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def draw(self) -> str:
        with self.lock:
            self.count["requests"] += 1
            if self.random.random() >= self.trouble:
                return "well"
            kind = self.random.choice(["503", "drop", "cut", "stall"])
            self.count[kind] += 1
            return kind

    def handle_error(self, request, client_address):
        pass  # connections that the client closed


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body: bool):
        server: FlakyServer = self.server
        trouble = server.draw()
        if trouble == "drop":
            self.close_connection = True
            self.connection.close()
            return
        if trouble == "stall":
            time.sleep(server.stall_s)
        if trouble == "503":
            self.send_error(503)
            return
        path = server.folder / unquote(self.path.lstrip("/"))
        if ".." in path.parts or not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(wanted[1]), min(int(wanted[2]), len(data) - 1)) if wanted else (0, len(data) - 1)
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        if body:
            body_bytes = data[first : last + 1]
            if trouble == "cut":
                body_bytes = body_bytes[: len(body_bytes) // 2]
            self.wfile.write(body_bytes)
            with server.lock:
                server.count["bytes"] += len(body_bytes)
            if trouble == "cut":
                self.close_connection = True
                self.connection.close()

    def log_message(self, *_):
        pass


@contextmanager
def serve(folder: Path, *, seed: int = 0, trouble: float = 0.0, stall_s: float = 0.0):
    """Serve a folder while the block runs; yields the server."""
    server = FlakyServer(folder, seed=seed, trouble=trouble, stall_s=stall_s)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
