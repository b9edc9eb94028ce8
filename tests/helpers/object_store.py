"""A stand-in for Google Cloud Storage on loopback: the part of its JSON API that gcsfs speaks, with faults on request.

Objects are whole or not there, as in the real one. `faults` may refuse, delay, or hide new objects from listings.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit


@dataclass
class Store:
    """The objects of one bucket, and what it does to those who ask."""

    objects: dict[str, bytes] = field(default_factory=dict)
    written: list[str] = field(default_factory=list)  # names, in the order in which they were written
    removed: list[str] = field(default_factory=list)
    read: list[str] = field(default_factory=list)
    late: float = 0.0  # seconds for which a new object is in no listing
    fault: Callable[[str, str], int | None] = lambda method, name: None  # an HTTP status instead of an answer
    after_write: Callable[[int], None] = lambda count: None  # with the number of writes so far
    environment: dict[str, str] = field(default_factory=dict)  # that makes gcsfs ask here
    sessions: dict[str, bytes] = field(default_factory=dict)  # large objects that are on their way
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _born: dict[str, float] = field(default_factory=dict)
    _generation: dict[str, int] = field(default_factory=dict)

    def put(self, name: str, data: bytes) -> dict[str, Any]:
        with self._lock:
            self.objects[name] = data
            self._born.setdefault(name, time.monotonic())
            self._generation[name] = self._generation.get(name, 0) + 1
            self.written.append(name)
            count = len(self.written)
        self.after_write(count)
        return self.info(name)

    def remove(self, name: str) -> bool:
        with self._lock:
            self.removed.append(name)
            self._born.pop(name, None)
            return self.objects.pop(name, None) is not None

    def info(self, name: str) -> dict[str, Any]:
        data = self.objects[name]
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": "bucket",
            "size": str(len(data)),
            "generation": str(self._generation.get(name, 0)),
        }

    def listed(self, prefix: str, delimiter: str) -> tuple[list[str], list[str]]:
        names, folders = [], set()
        now = time.monotonic()
        for name in sorted(self.objects):
            if not name.startswith(prefix) or now - self._born.get(name, 0.0) < self.late:
                continue
            head, found, _ = name.removeprefix(prefix).partition(delimiter) if delimiter else (name, "", "")
            if found:
                folders.add(prefix + head + delimiter)
            else:
                names.append(name)
        return names, sorted(folders)


class _Handler(BaseHTTPRequestHandler):
    store: Store
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, **headers: str) -> None:
        self._answer(200, json.dumps(value).encode(), **headers)

    def _handled(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = re.search(r"/o/(.+)$", url.path)
        name = unquote(found[1]) if found else query.get("name", "")
        status = self.store.fault(self.command, name)
        if status is not None:
            self._answer(status, b'{"error": {"message": "a fault that was asked for"}}')
        elif self.command == "POST":
            self._upload(query, body)
        elif self.command == "DELETE":
            self._answer(204 if self.store.remove(name) else 404)
        elif found:
            self._object(name, query)
        elif url.path.endswith("/o"):
            names, folders = self.store.listed(query.get("prefix", ""), query.get("delimiter", ""))
            self._json({"items": [self.store.info(each) for each in names], "prefixes": folders})
        else:
            self._json({"kind": "storage#bucket", "name": "bucket", "id": "bucket"})

    def _object(self, name: str, query: dict[str, str]) -> None:
        if name not in self.store.objects:
            self._answer(404, b'{"error": {"message": "Not Found"}}')
        elif query.get("alt") == "media":
            data = self.store.objects[name]
            self.store.read.append(name)
            self._answer(200, data, "application/octet-stream")
        else:
            self._json(self.store.info(name))

    def _upload(self, query: dict[str, str], body: bytes) -> None:
        if query.get("uploadType") == "multipart":
            # Two parts, as gcsfs spells them: what it is called, and what it holds.
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
            assert boundary
            _, about, content = body.removesuffix(f"\n--{boundary[1]}--".encode()).split(f"--{boundary[1]}".encode(), 2)
            self._json(self.store.put(json.loads(about.partition(b"\n\n")[2])["name"], content.partition(b"\n\n")[2]))
        elif "session" not in query:
            session = f"{json.loads(body)['name']}"
            self.store.sessions[session] = b""
            self._json({}, Location=f"http://{self.headers['Host']}/upload/x?session={quote(session, safe='')}")
        else:
            # A piece of a large one; it is there once it is whole.
            name, total = query["session"], self.headers["Content-Range"].rpartition("/")[2]
            self.store.sessions[name] += body
            if total != "*" and len(self.store.sessions[name]) == int(total):
                self._json(self.store.put(name, self.store.sessions.pop(name)))
            else:
                self._answer(308, Range=f"bytes=0-{len(self.store.sessions[name]) - 1}")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handled


@contextmanager
def served(store: Store) -> Iterator[str]:
    """Serve the bucket "bucket"; gives its address, and sets `store.environment`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": store}))
    server.daemon_threads = True
    server.handle_error = lambda request, client: None  # a client that has left
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    # Without the last one gcsfs asks for the kind of bucket in a protocol that is not spoken here.
    names = ("STORAGE_EMULATOR_HOST", "FSSPEC_GS_TOKEN", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT")
    store.environment = dict(zip(names, (address, "anon", "false")))
    try:
        yield address
    finally:
        server.shutdown()
        server.server_close()
