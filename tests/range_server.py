"""A folder served by ranges over loopback HTTP, with the faults of a real network."""

from __future__ import annotations

import base64
import contextlib
import http.server
import re
import threading
from pathlib import Path
from urllib.parse import urlsplit


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves a folder by ranges; the server's `faults` are taken by its requests, one each, first come first served."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        with self.server.lock:
            fault = self.server.faults.pop(0) if self.server.faults else ""
            self.server.requests.append((self.path, self.headers.get("Range"), fault))
        asked = urlsplit(self.path)  # a proxy is asked for a complete URL
        path = self.server.folder / asked.path.lstrip("/")
        if not self.allowed(asked.query):
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "busy" or not path.is_file():
            self.send_response(503 if fault == "busy" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if found and not self.server.ignores_ranges:
            data = data[int(found[1]) : int(found[2]) + 1]
            self.send_response(206)
        else:
            self.send_response(200)
        if fault == "flip":
            data = data[:200] + bytes([data[200] ^ 1]) + data[201:]
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "cut":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif fault == "silent":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.server.released.wait(20)
            self.close_connection = True
        elif body:
            self.wfile.write(data)

    def allowed(self, query):
        user, wanted = self.server.user, self.server.query
        sent = self.headers.get("Authorization", "")
        expected = "" if user is None else "Basic " + base64.b64encode(":".join(user).encode()).decode()
        return sent == expected and query == wanted


@contextlib.contextmanager
def serving(folder: Path):
    """Serve `folder` at the yielded server's `url`; `user` and `query` are what it asks of a client."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.folder, server.faults, server.requests, server.lock = folder, [], [], threading.Lock()
    server.ignores_ranges, server.released = False, threading.Event()
    server.user, server.query = None, ""
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
