"""The worker's health page, for liveness probes.

It answers 200 while the dispatcher's thread takes turns, and 503 once it has stalled for longer than an outage of Redis that
one would sit out. A worker whose Redis is down is waiting, not ill: restarting it would not help.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

#: Seconds without a turn of the dispatcher after which the worker counts as stalled.
STALLED_AFTER = 120.0
#: Where the page is; the second is what most probes are set to.
PATHS = ("/", "/healthz")


def serve(port: int, stalled_for: Callable[[], float]) -> ThreadingHTTPServer:
    """Serve the page in its own threads until `shutdown`; `stalled_for` returns seconds."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.partition("?")[0] not in PATHS:
                self.send_error(404)
                return
            age = stalled_for()
            body = json.dumps({"healthy": age < STALLED_AFTER, "last_turn_s": round(age, 1)}).encode()
            self.send_response(200 if age < STALLED_AFTER else 503)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Probes come every few seconds; they are not worth a log line."""

    server = ThreadingHTTPServer(("", port), Handler)
    threading.Thread(target=server.serve_forever, name="health", daemon=True).start()
    return server
