"""The HTTP edge: one call of the user-attribute API and a complete reading of its answer.

Facts: Tencent Cloud Chat documents 1047/37170 (`im_set_attr`), 1047/60565 (`timpush/set_attr`), 1047/34620
(general rules). The API answers HTTP 200 even on failure; the truth is in `ErrorCode`, and, under a
successful `ErrorCode`, in `ErrorList`.

Nothing that `requests` raises leaves this module, in no form: the text of its exceptions, and of the
ones behind them, holds the URL and with it the UserSig. What leaves is the kind of failure, in our words.
"""

from __future__ import annotations

import dataclasses
import http.client
import io
import json
import random
import socket
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from urllib.parse import urlencode

import requests
import requests.adapters
import urllib3
import urllib3.connection

from worker.delivery.usersig import Signer
from worker.models import Attributes, UserId

#: Where the commands of the two twins are, by the name that settings use.
PATHS = {"chat": "v4/all_member_push/im_", "push": "v4/timpush/"}

#: Entered right before a request is written, left as soon as it is; see `ChatApi.send`.
Gate = AbstractContextManager[object]

#: No honest reply is longer (100 users in `ErrorList` are about 10 kB).
MAX_REPLY_BYTES = 1_000_000

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


_this_thread = threading.local()


class _DeadlineReader(io.RawIOBase):
    """Reads from a socket until this thread's deadline: a socket's own timeout starts anew with every packet."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        # The socket stays open for as long as somebody reads from it.
        self._file = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = _this_thread.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)
        return self._file.readinto(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()


class _DeadlineResponse(http.client.HTTPResponse):
    """A response whose head and body together must come by the deadline."""

    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp.close()
        self.fp = io.BufferedReader(_DeadlineReader(sock))


class _Gated:
    """Makes a connection wait at the gate: what takes time (looking up the host, connecting, TLS, the
    request's own making) comes before, so that a request leaves at the very moment it is let through.
    The time for the answer begins there, too: waiting for the slot is not the API's fault.

    Head and body leave in one write. With two, other threads get their turn in between, and a call has
    arrived only when its body has.
    """

    response_class: Any = _DeadlineResponse
    _head: bytes | None = None

    def endheaders(self: Any, *args: Any, **options: Any) -> None:
        if self.sock is None:
            self.connect()
        self._head = None
        super().endheaders(*args, **options)  # type: ignore[misc]  # the class it is mixed into has it

    def send(self: Any, data: Any) -> None:
        """Keep the head; with the body, pass the gate and write both. Every call here has a body."""
        if self._head is None:
            self._head = data
            return
        request, self._head = self._head + data, None
        with _this_thread.gate:
            _this_thread.deadline = time.monotonic() + _this_thread.read_timeout
            super().send(request)  # type: ignore[misc]  # the same


class _GatedHTTP(_Gated, urllib3.connection.HTTPConnection):
    pass


class _GatedHTTPS(_Gated, urllib3.connection.HTTPSConnection):
    pass


class _HTTPPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _GatedHTTP


class _HTTPSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _GatedHTTPS


class _GatedAdapter(requests.adapters.HTTPAdapter):
    """Never retries: urllib3 would do so by itself, out of slot, and log the URL."""

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}


@dataclass(frozen=True, slots=True)
class UserError:
    """One entry of `ErrorList`. `code` -1 when the entry has none."""

    code: int
    info: str


@dataclass(frozen=True, slots=True)
class Reply:
    """A readable answer. `code` 0 means success for every user that is not in `errors`.

    `info` and the entries' `info` are the API's own words: they may quote values, so they go into
    dead letters, never into logs.
    """

    code: int
    info: str = ""
    errors: Mapping[UserId, UserError] = field(default_factory=dict)
    request_id: str = ""
    #: The app's attribute names, when they were asked for.
    names: frozenset[str] = frozenset()
    #: When the UserSig of the call was made, seconds since 1970.
    signed_at: int = field(default=0, compare=False)
    #: The API's own time, as the header has it.
    date: str = field(default="", compare=False)


class Failure(StrEnum):
    """Why there is no readable answer."""

    UNREACHABLE = "unreachable"  # no connection: the request never left
    TIMEOUT = "timeout"
    BROKEN = "connection broken"
    HTTP_STATUS = "http status"
    UNREADABLE = "unreadable reply"


@dataclass(frozen=True, slots=True)
class NoReply:
    """No readable answer. Unless `sent` is False the API may have applied the call, or still will."""

    failure: Failure
    sent: bool = True
    http_status: int | None = None


#: `ActionStatus` is FAIL, or missing, under `ErrorCode` 0: a failure that the API did not number.
UNNUMBERED = -1


def read_reply(body: bytes) -> Reply | NoReply:
    """Read an answer with HTTP status 200, by the documented fields; unknown ones are ignored."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return NoReply(Failure.UNREADABLE)
    if not isinstance(answer, dict) or type(answer.get("ErrorCode")) is not int:
        return NoReply(Failure.UNREADABLE)
    entries = answer.get("ErrorList") or []
    if not isinstance(entries, list):
        return NoReply(Failure.UNREADABLE)
    names = answer.get("AttrNames") or {}
    if not isinstance(names, dict):
        return NoReply(Failure.UNREADABLE)
    code: int = answer["ErrorCode"]
    if code == 0 and answer.get("ActionStatus") != "OK":
        code = UNNUMBERED
    return Reply(
        code=code,
        info=str(answer.get("ErrorInfo") or ""),
        errors=dict(filter(None, map(_user_error, entries))),
        request_id=str(answer.get("RequestId") or ""),
        names=frozenset(name for name in names.values() if isinstance(name, str)),
    )


def _user_error(entry: Any) -> tuple[UserId, UserError] | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("To_Account"), str):
        return None
    code = entry.get("ErrorCode")
    if code == 0:
        return None
    number = code if type(code) is int else UNNUMBERED
    return entry["To_Account"], UserError(number, str(entry.get("ErrorInfo") or ""))


class ChatApi:
    """Calls `im_set_attr`, its companions, or their twins. Thread-safe: each thread has a connection."""

    def __init__(
        self,
        base_url: str,
        signer: Signer,
        *,
        sdkappid: int,
        identifier: str,
        api: str = "chat",
        connect_timeout: float = 3.05,
        read_timeout: float = 10.0,
    ) -> None:
        """Timeouts in seconds; the API's own is 3 s, so `read_timeout` must be longer."""
        self._url = f"{base_url.rstrip('/')}/{PATHS[api]}"
        self._query = {"sdkappid": sdkappid, "identifier": identifier, "contenttype": "json"}
        self._signer = signer
        self._timeouts = (connect_timeout, read_timeout)
        self._local = threading.local()

    @property
    def longest_call(self) -> float:
        """Seconds that one call can take at most, connecting included."""
        return sum(self._timeouts)

    @staticmethod
    def encode(users: Iterable[tuple[UserId, Attributes | Sequence[str]]]) -> bytes:
        """The body of a call; kept apart from `send` so that it can be made before the slot comes.

        To set, each user has attributes; to remove, a list of names.
        """
        return _encode({"UserAttrs": [{"To_Account": u, "Attrs": attrs} for u, attrs in users]}).encode()

    def sign_again(self) -> None:
        """Make a new UserSig; the key is read anew for it."""
        self._signer.sign_again()

    def adopt_signature(self, issued: int) -> None:
        """Sign as of that time (seconds since 1970) when the present UserSig is older: the fleet found it bad."""
        self._signer.adopt(issued)

    def send(self, body: bytes, gate: Gate) -> Reply | NoReply:
        """Set attributes with one call. Never raises for anything the network or the API does.

        `gate` is entered once the connection stands and everything is ready, right before the first
        byte is written. It waits until it is time to send, and what it raises passes through. It is left when
        the last byte is on its way.
        """
        return self._call("set_attr", body, gate)

    def remove(self, body: bytes, gate: Gate) -> Reply | NoReply:
        """Remove attributes with one call (document 1047/37171), as `send` sets them."""
        return self._call("remove_attr", body, gate)

    def attribute_names(self, gate: Gate) -> Reply | NoReply:
        """Ask for the app's attribute names (document 1047/37168)."""
        return self._call("get_attr_name", b"{}", gate)

    def set_attribute_names(self, names: Iterable[str], gate: Gate, *, first: int = 0) -> Reply | NoReply:
        """Give the app new attribute names, numbered from `first` (document 1047/37167)."""
        numbered = {str(number): name for number, name in enumerate(names, first)}
        return self._call("set_attr_name", _encode({"AttrNames": numbered}).encode(), gate)

    def _call(self, command: str, body: bytes, gate: Gate) -> Reply | NoReply:
        session, request = self._session()
        _this_thread.gate, _this_thread.read_timeout = gate, self._timeouts[1]
        usersig = self._signer.current()
        query = {**self._query, "usersig": usersig.text, "random": random.getrandbits(32)}
        request = request.copy()
        request.url = f"{self._url}{command}?{urlencode(query)}"
        request.body = body
        request.headers["Content-Length"] = str(len(body))
        # What is raised is turned into a value inside, and its traceback ends there with it.
        answer = self._exchange(session, request)
        return dataclasses.replace(answer, signed_at=usersig.issued) if isinstance(answer, Reply) else answer

    def _session(self) -> tuple[requests.Session, requests.PreparedRequest]:
        """This thread's session, and a request to copy: preparing one anew each time costs 0.3 ms."""
        if not hasattr(self._local, "session"):
            session = requests.Session()
            session.trust_env = False  # no proxies and .netrc from the environment
            adapter = _GatedAdapter(max_retries=0)
            session.mount("https://", adapter)
            session.mount("http://", adapter)
            headers = {
                "Content-Type": "application/json",
                "Accept-Encoding": "identity",
                "User-Agent": "imattr",
            }
            request = session.prepare_request(
                requests.Request("POST", self._url, headers=headers, data=b"{}")
            )
            self._local.session, self._local.request = session, request
        return self._local.session, self._local.request

    def _exchange(self, session: requests.Session, request: requests.PreparedRequest) -> Reply | NoReply:
        try:
            with session.send(
                request, timeout=self._timeouts, allow_redirects=False, stream=True
            ) as response:
                body = _read(response)
                status, date = response.status_code, response.headers.get("Date", "")
        except requests.exceptions.ConnectTimeout:
            return NoReply(Failure.UNREACHABLE, sent=False)
        except (requests.exceptions.Timeout, TimeoutError, urllib3.exceptions.TimeoutError):
            return NoReply(Failure.TIMEOUT)
        except requests.exceptions.ConnectionError as error:
            sent = not _never_connected(error)
            return NoReply(Failure.BROKEN if sent else Failure.UNREACHABLE, sent=sent)
        except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, OSError):
            return NoReply(Failure.BROKEN)
        if status != 200:
            return NoReply(Failure.HTTP_STATUS, http_status=status)
        reply = read_reply(body)
        return dataclasses.replace(reply, date=date) if isinstance(reply, Reply) else reply


def _never_connected(error: requests.exceptions.ConnectionError) -> bool:
    """Whether the failure is one of connecting (refused, no such host), so that nothing was sent."""
    reason = getattr(error.args[0] if error.args else None, "reason", None)
    return isinstance(reason, urllib3.exceptions.NewConnectionError | urllib3.exceptions.NameResolutionError)


def _read(response: requests.Response) -> bytes:
    """The body; raises `OSError` when it is too long or cut short."""
    body = bytearray()
    while chunk := response.raw.read1(65_536):
        body += chunk
        if len(body) > MAX_REPLY_BYTES:
            raise OSError("reply too long")
    # urllib3's read1 returns nothing at a connection closed early, too.
    expected = response.headers.get("Content-Length", "")
    if expected.isdigit() and len(body) < int(expected):
        raise OSError("reply cut short")
    return bytes(body)
