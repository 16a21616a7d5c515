"""A worker's health page, for machines: whether it is alive, whether it is ready, and its metrics.

Alive means that the dispatcher's thread takes turns. A worker counts as dead only after longer than any outage of Redis that
it would sit out: while Redis is down it waits, and restarting it would not help. Ready means that it takes work: it is
registered at the broker, and Redis has answered it lately.
"""

from __future__ import annotations

import json
import socket
import socketserver
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

#: Seconds without a turn of the dispatcher after which the worker counts as stalled.
STALLED_AFTER = 120.0
#: Seconds without an answer of Redis after which the worker is not ready.
UNREADY_AFTER = 10.0
#: The paths that say whether a worker is alive; most probes use the last.
LIVE_PATHS = ("/livez", "/healthz", "/")


class Answer(NamedTuple):
    """A page's answer."""

    status: int
    content_type: str
    body: bytes


class _Server(ThreadingHTTPServer):
    """Listens on IPv6, too, if the machine has it: some clusters have only that."""

    def __init__(self, host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        if ":" in host or (not host and socket.has_dualstack_ipv6()):
            self.address_family = socket.AF_INET6
        super().__init__((host, port), handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # Not that of `HTTPServer`, which looks up our own name, and waits for that.
        socketserver.TCPServer.server_bind(self)


#: The page at each path, from what the client accepts (`Accept`) to its answer.
Pages = Mapping[str, Callable[[str], Answer]]


def serve(port: int, pages: Pages, *, host: str = "") -> ThreadingHTTPServer:
    """Serve the pages in threads of their own until `shutdown`; on all interfaces without a `host`.

    Raises `OSError` if the port cannot be used.
    """

    class Handler(BaseHTTPRequestHandler):
        #: Seconds in which a client must send its request: a silent connection must not occupy a thread.
        timeout = 10

        def do_GET(self) -> None:
            page = pages.get(self.path.partition("?")[0])
            if page is None:
                self.send_error(404)
                return
            status, content_type, body = page(self.headers.get("Accept", ""))
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Probes come every few seconds; they are not worth a log line."""

    server = _Server(host, port, Handler)
    threading.Thread(target=server.serve_forever, name="health", daemon=True).start()
    return server


def live(stalled_for: Callable[[], float]) -> Callable[[str], Answer]:
    """The page that says whether the worker is alive; `stalled_for` returns seconds."""

    def answer(_accept: str) -> Answer:
        age = stalled_for()
        return _json(age < STALLED_AFTER, {"healthy": age < STALLED_AFTER, "last_turn_s": round(age, 1)})

    return answer


def ready(unanswered_for: Callable[[], float], is_registered: Callable[[], bool]) -> Callable[[str], Answer]:
    """The page that says whether the worker takes work.

    `unanswered_for` returns the seconds since Redis last answered, `is_registered` whether the broker sends it messages.
    """

    def answer(_accept: str) -> Answer:
        redis, broker = unanswered_for() < UNREADY_AFTER, is_registered()
        return _json(redis and broker, {"ready": redis and broker, "redis": redis, "broker": broker})

    return answer


def _json(good: bool, body: dict[str, object]) -> Answer:
    return Answer(200 if good else 503, "application/json", json.dumps(body).encode())
