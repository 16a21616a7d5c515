"""One HTTP exchange in three steps: prepare, send, read. Everything slow happens before the slot; only the write is in it.

requests has no such steps, so this module is the one place that opens it up, with an adapter whose connection pools are its
own. Their connections collect a request instead of writing it piece by piece, and read the answer up to one deadline.
`tests/delivery/test_connection.py` fails when a new version of requests, urllib3 or http.client breaks that.

No exception of these libraries leaves this module: their text, and that of their causes, contains the URL and with it the
UserSig. What leaves is the kind of failure, in our words.
"""

from __future__ import annotations

import http.client
import io
import socket
import threading
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Protocol

import requests
import requests.adapters
import urllib3
import urllib3.connection

from worker.delivery.answers import UNREACHABLE, Failure, NoReply

#: No honest answer is longer (100 users in `ErrorList` are about 10 kB).
MAX_ANSWER_BYTES = 1_000_000

_HEADERS = {"Content-Type": "application/json", "Accept-Encoding": "identity", "User-Agent": "imattr"}

_TIMEOUTS = (TimeoutError, urllib3.exceptions.TimeoutError, requests.Timeout)


@dataclass(frozen=True, slots=True)
class RawAnswer:
    """The body of an answer with HTTP status 200, and its `Date` header."""

    body: bytes
    date: str = ""


class Exchange(Protocol):
    """One prepared request. Each method is called at most once; none raises because of the network."""

    def send(self) -> None:
        """Write the whole request. Returns when its last byte is on its way."""

    def read(self) -> RawAnswer | NoReply:
        """Wait for the answer to what was sent."""

    def abandon(self) -> None:
        """Abandon the request unsent."""


class Transport(Protocol):
    """Prepares requests; tests may use one without a network."""

    def prepare(self, url: str, body: bytes) -> Exchange | NoReply:
        """Connect and encode a POST request; returns `NoReply` if it cannot connect: then nothing was sent."""


class HttpTransport:
    """Sends requests over HTTP/1.1. Thread-safe: each thread has a connection of its own, which it keeps."""

    def __init__(self, *, connect_timeout: float, read_timeout: float) -> None:
        """`read_timeout` is for the write and the whole answer together; both in seconds."""
        self._connect_timeout, self._read_timeout = connect_timeout, read_timeout
        self._local = threading.local()

    def prepare(self, url: str, body: bytes) -> Exchange | NoReply:
        # Any exception: these libraries raise all kinds, even for what the other side says.
        try:
            pool = self._pool(url)
            connection = pool.checkout(self._connect_timeout)
            options = {"preload_content": False, "decode_content": False}
            connection.request("POST", _target(url), body, _HEADERS, **options)
        except Exception:
            return UNREACHABLE
        return _HttpExchange(pool, connection, self._read_timeout)

    def _pool(self, url: str) -> Any:
        """This thread's pool for the host. Looked up once: it costs the adapter 0.1 ms."""
        if not hasattr(self._local, "pool"):
            session = requests.Session()
            request = session.prepare_request(requests.Request("POST", url.partition("?")[0]))
            self._local.pool = _Adapter().pool(request)
        return self._local.pool


class _HttpExchange:
    """A request waiting in its connection."""

    def __init__(self, pool: Any, connection: Any, read_timeout: float) -> None:
        self._pool, self._connection, self._read_timeout = pool, connection, read_timeout
        self._sent = False

    def send(self) -> None:
        try:
            self._connection.write(self._read_timeout)
            self._sent = True
        except Exception:
            # It is not known how much of it has left: `read` says so.
            self._connection.close()

    def read(self) -> RawAnswer | NoReply:
        answer = self._read() if self._sent else NoReply(Failure.BROKEN)
        if not isinstance(answer, RawAnswer):
            self._connection.close()
        # A closed connection goes back, too: the pool reopens it when needed.
        self._pool.checkin(self._connection)
        return answer

    def _read(self) -> RawAnswer | NoReply:
        try:
            response = self._connection.getresponse()
            body = _read_body(response)
            date = response.headers.get("Date", "")
            wait = _retry_after(response.headers.get("Retry-After", ""), date)
        except _TIMEOUTS:
            return NoReply(Failure.TIMEOUT)
        except Exception:
            # Not only for network errors: the libraries may stumble over an answer.
            return NoReply(Failure.BROKEN)
        # A redirect is a status like any other: its target is ignored.
        if response.status != 200:
            return NoReply(Failure.HTTP_STATUS, http_status=response.status, retry_after=wait)
        return RawAnswer(body, date)

    def abandon(self) -> None:
        # http.client cannot take back a request that was begun.
        self._connection.close()
        self._pool.checkin(self._connection)


def _target(url: str) -> str:
    """The part of a URL that goes into the request line."""
    return "/" + url.partition("://")[2].partition("/")[2]


def _read_body(response: urllib3.HTTPResponse) -> bytes:
    """The whole body; raises `OSError` when it is too long or cut short."""
    body = bytearray()
    while chunk := response.read1(65_536):
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            raise OSError("answer too long")
    # read1 also returns nothing when the connection was closed early.
    expected = response.headers.get("Content-Length", "")
    if expected.isascii() and expected.isdigit() and len(body) < int(expected):
        raise OSError("answer cut short")
    return bytes(body)


def _retry_after(given: str, date: str) -> float:
    """Seconds that a `Retry-After` header asks for, as a number or as a time; 0.0 if it says nothing readable."""
    if given.isascii() and given.isdigit():
        return float(given[:9])
    try:
        seconds = (parsedate_to_datetime(given) - parsedate_to_datetime(date)).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return max(0.0, seconds)


class _Connection:
    """Mixed into urllib3's connections: collects a request, writes it at once, reads up to a deadline.

    One write, because between two of them other threads get their turn, and a call has arrived only when its last
    byte has. One deadline, because a socket's own timeout starts again with every packet.
    """

    timeout: Any
    sock: Any
    _collected: bytes = b""
    _deadline: float = 0.0

    def request(self: Any, *args: Any, **options: Any) -> None:
        self._collected = b""
        super().request(*args, **options)  # type: ignore[misc]  # the class it is mixed into has it

    def send(self, data: bytes) -> None:
        """Collect: http.client calls this for the head, then for the body."""
        self._collected += data

    def write(self: Any, timeout: float) -> None:
        """Write what was collected; the answer, too, must be complete within `timeout` seconds."""
        self._deadline, self.timeout = time.monotonic() + timeout, timeout
        self.sock.settimeout(timeout)
        self.sock.sendall(self._collected)

    def response_class(self, sock: socket.socket, **options: Any) -> http.client.HTTPResponse:
        """http.client calls this to read an answer."""
        timed: Any = _TimedSocket(sock, self._deadline)
        return http.client.HTTPResponse(timed, **options)


class _TimedSocket:
    """The part of a socket that `http.client.HTTPResponse` needs, with a deadline (monotonic, seconds)."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock, self._deadline = sock, deadline

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_DeadlineReader(self._sock, self._deadline))


class _DeadlineReader(io.RawIOBase):
    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock, self._deadline = sock, deadline
        # Keeps the socket open for as long as somebody reads from it.
        self._file = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)
        return self._file.readinto(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()


class _HttpConnection(_Connection, urllib3.connection.HTTPConnection):  # type: ignore[misc]
    pass


class _HttpsConnection(_Connection, urllib3.connection.HTTPSConnection):  # type: ignore[misc]
    pass


class _Pool:
    """Mixed into urllib3's pools: lends connections that are open."""

    def checkout(self: Any, connect_timeout: float) -> Any:
        """Return an open connection; one that the other side has closed is reopened."""
        connection = self._get_conn()
        if connection.is_closed:
            connection.timeout = connect_timeout
            try:
                connection.connect()
            except BaseException:
                connection.close()
                self.checkin(connection)
                raise
        return connection

    def checkin(self: Any, connection: Any) -> None:
        self._put_conn(connection)


class _HttpPool(_Pool, urllib3.HTTPConnectionPool):
    ConnectionCls = _HttpConnection


class _HttpsPool(_Pool, urllib3.HTTPSConnectionPool):
    ConnectionCls = _HttpsConnection


class _Adapter(requests.adapters.HTTPAdapter):
    """Chooses the pool, and the certificates to verify with. Sends nothing itself, so it never retries."""

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}

    def pool(self, request: requests.PreparedRequest) -> Any:
        """The pool for the request's host, with proxies and certificates from the environment ignored."""
        pool = self.get_connection_with_tls_context(request, verify=True, proxies={})
        self.cert_verify(pool, str(request.url), True, None)  # type: ignore[no-untyped-call]
        return pool
