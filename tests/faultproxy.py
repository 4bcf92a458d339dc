"""An HTTP proxy in front of an object store that fails as networks and stores do, by rules that a test sets."""

from __future__ import annotations

import contextlib
import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials


@dataclass
class Faults:
    """What goes wrong, and what did.

    Attributes:
        errors: share of requests answered with 503 SlowDown or 500 instead of being passed on.
        truncate: share of answers with a body that break off in the middle of it.
        reset: share of uploads that are cut while the body is on its way.
        stalls: number of requests that first wait ``stall`` seconds.
        forbid_after: requests beyond this number are answered with 403; None: none.
        seen: counts by what was done.
        sent: bytes of answers to GET by path.
        pace: seconds that an answer takes to arrive, in ten pieces; 0: at once.
        away: nothing is answered, connections are cut.
        public: key and secret of the store, as which readers without credentials are passed on; those with some are refused.
    """

    errors: float = 0.0
    truncate: float = 0.0
    reset: float = 0.0
    stalls: int = 0
    stall: float = 10.0
    forbid_after: int | None = None
    seed: int = 0
    seen: Counter = field(default_factory=Counter)
    sent: Counter = field(default_factory=Counter)
    pace: float = 0.0
    away: bool = False
    public: tuple[str, str] | None = None

    def __post_init__(self):
        self.random, self.lock = random.Random(self.seed), threading.Lock()

    def draw(self, method: str) -> str:
        """What happens to the next request."""
        with self.lock:
            self.seen["requests"] += 1
            kind = "pass"
            if self.away:
                kind = "away"
            elif self.forbid_after is not None and self.seen["requests"] > self.forbid_after:
                kind = "forbid"
            elif self.stalls:
                self.stalls -= 1
                kind = "stall"
            elif self.random.random() < self.errors:
                kind = "error"
            elif method == "GET" and self.random.random() < self.truncate:
                kind = "truncate"
            elif method == "PUT" and self.random.random() < self.reset:
                kind = "reset"
            self.seen[kind] += 1
            return kind


def signed(method: str, url: str, headers: dict[str, str], key: tuple[str, str]) -> dict[str, str]:
    """The headers of a request, and those that sign it."""
    kept = {name: value for name, value in headers.items() if name.lower() == "range"}
    request = AWSRequest(method, url, headers=kept)
    S3SigV4Auth(Credentials(*key), "s3", "us-east-1").add_auth(request)
    return dict(request.headers.items())


@contextlib.contextmanager
def before(endpoint: str, faults: Faults) -> Iterator[str]:
    """Starts a proxy in front of an endpoint; yields its own URL."""
    target = urlsplit(endpoint)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def handle_one(self):
            kind = faults.draw(self.command)
            length = int(self.headers.get("Content-Length") or 0)
            if kind == "away":
                self.close_connection = True
                return
            if kind == "reset":
                self.rfile.read(length // 2)
                self.close_connection = True
                return
            body = self.rfile.read(length)
            if kind == "stall":
                time.sleep(faults.stall)
            if kind == "error":
                code = faults.random.choice([500, 503])
                return self.answer(code, b"<Error><Code>SlowDown</Code><Message>slow</Message></Error>")
            if kind == "forbid":
                return self.answer(403, b"<Error><Code>AccessDenied</Code><Message>denied</Message></Error>")
            if faults.public and self.headers.get("Authorization"):
                return self.answer(403, b"<Error><Code>AccessDenied</Code><Message>not anonymous</Message></Error>")
            upstream = http.client.HTTPConnection(target.hostname, target.port, timeout=60)
            # The Host header is signed, so it is passed on as it is.
            headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection", "expect")}
            if faults.public:
                headers = signed(self.command, endpoint + self.path, headers, faults.public)
            upstream.request(self.command, self.path, body, headers)
            got = upstream.getresponse()
            data = got.read()
            self.send_response(got.status)
            for name, value in got.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                    self.send_header(name, value)
            size = got.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", size or "0")
            self.end_headers()
            if self.command != "HEAD":
                if kind == "truncate" and len(data) > 1:
                    self.wfile.write(data[: len(data) // 2])
                    self.close_connection = True
                else:
                    faults.sent[urlsplit(self.path).path] += len(data) if self.command == "GET" else 0
                    piece = max(1, -(-len(data) // 10)) if faults.pace else max(1, len(data))
                    for start in range(0, len(data), piece):
                        self.wfile.write(data[start : start + piece])
                        self.wfile.flush()
                        time.sleep(faults.pace / 10)
            upstream.close()

        def answer(self, code: int, body: bytes):
            self.send_response(code)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(0 if self.command == "HEAD" else len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_one

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
