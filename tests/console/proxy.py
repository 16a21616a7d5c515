"""A proxy in front of the console as a company has one: it asks who somebody is, tells the console by a header, and serves it
below a prefix, beside other things.
"""

from __future__ import annotations

import base64
import http.client
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HEADER = "X-Forwarded-User"
#: What goes no further than the next hop.
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade", "proxy-authorization"}


@dataclass(frozen=True, slots=True)
class Proxy:
    """Where it listens. `passwords` are those of the people whom it lets through, by name."""

    url: str
    passwords: Mapping[str, str]
    #: Paths that were asked for outside the prefix, where something else lives.
    strayed: list[str] = field(default_factory=list)


@contextmanager
def proxy(console_port: int, prefix: str, *names: str) -> Iterator[Proxy]:
    """Run it in a thread, in front of a console on this machine."""
    passwords = {name: f"{name}'s password" for name in names}
    strayed: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 10

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path != prefix and not path.startswith(f"{prefix}/"):
                strayed.append(path)
                self._answer(404, [], b"something else lives here")
                return
            name = self._who()
            if name is None:
                self._answer(401, [("WWW-Authenticate", 'Basic realm="proxy"')], b"who are you?")
                return
            self._pass_on(name)

        do_POST = do_HEAD = do_GET

        def _who(self) -> str | None:
            kind, _, text = self.headers.get("Authorization", "").partition(" ")
            if kind != "Basic":
                return None
            name, _, password = base64.b64decode(text).decode().partition(":")
            return name if passwords.get(name) == password else None

        def _pass_on(self, name: str) -> None:
            headers = {
                header: text
                for header, text in self.headers.items()
                # What somebody claims to be counts for nothing.
                if header.lower() not in {*HOP_BY_HOP, "authorization", HEADER.lower()}
            }
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            onward = http.client.HTTPConnection("127.0.0.1", console_port, timeout=30)
            try:
                onward.request(self.command, self.path, body or None, headers | {HEADER: name})
                reply = onward.getresponse()
                self._answer(reply.status, reply.getheaders(), reply.read())
            finally:
                onward.close()

        def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
            self.send_response_only(status)
            for header, text in headers:
                if header.lower() not in {*HOP_BY_HOP, "content-length"}:
                    self.send_header(header, text)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield Proxy(f"http://127.0.0.1:{server.server_address[1]}{prefix}", passwords, strayed)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
