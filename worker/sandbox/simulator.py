"""A faithful stand-in for the user-attribute API, which can also fail on purpose.

`Api` holds what the real service would: accounts, attributes, signatures, quotas, and answers requests by
the documented rules, in the order that independent clients suggest. `make_server` puts it behind HTTP and
adds latency and faults. What the documents leave open is a switch (`Quirks`), so that a client can be tested under every
interpretation. Every applied write is recorded with its arrival: tests and the demo use that record, not the product's own
counters, to judge the product.

Documents: 1047/37170 (set), 37171 (remove), 37169 (get), 37167/37168 (names), 60565 (the `timpush` twins),
1047/34348 (codes). `/simulator/...` is ours: GET state, users, record, arrivals, faults; POST quirks,
faults, users, accounts, names, administrators, key, reset-arrivals.
"""

from __future__ import annotations

import asyncio
import bisect
import collections
import dataclasses
import functools
import gc
import hmac
import json
import math
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import tornado.httpserver
import tornado.iostream
import tornado.web

from worker.delivery import usersig
from worker.models import MAX_ATTRIBUTES, MAX_NAME_BYTES, MAX_USER_ID_BYTES, MAX_VALUE_BYTES
from worker.sandbox import network
from worker.sandbox.faults import Fault, Faults

MAX_USERS = 100
#: Refused signatures in a row after which verification is blocked (70050), and for how many seconds.
MAX_REFUSED_SIGNATURES = 20
CLOSED_FOR = 60.0
REGISTRATION_ID_BYTES = 36


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_decode = json.JSONDecoder(parse_constant=_no_number).decode

#: Decides when a write happens: at once, never or later.
Perform = Callable[[Callable[[], None]], object]


def at_once(write: Callable[[], None]) -> None:
    """Write before the request is answered."""
    write()


def never(write: Callable[[], None]) -> None:
    """Write nothing, though the answer is the same."""


@dataclass(slots=True)
class Quirks:
    """What the documents leave open, and what a test may want to set."""

    #: Calls a second; 0 = no limit.
    quota: int = 100
    #: Seconds until a reply.
    latency: float = 0.0
    #: How long calls take to arrive; see `worker.sandbox.network`.
    network: str = ""
    #: One bad user or value: the whole batch is refused, it appears in ErrorList, or is skipped silently.
    #: (`timpush` always lists an account that does not exist.)
    bad_user: Literal["batch", "list", "silent"] = "batch"
    #: Whether the quota holds for every rolling second, or for each full second.
    window: Literal["rolling", "fixed"] = "rolling"
    #: Whether reads of attributes share the quota of the other calls, or have a quota of the same size for themselves.
    reads: Literal["shared", "apart"] = "shared"
    #: Whether refused calls count against the quota.
    refused_count: bool = True
    empty_values: Literal["refuse", "accept"] = "refuse"
    non_strings: Literal["refuse", "coerce"] = "refuse"
    #: Most bytes of a body; 0 = no limit.
    body_limit: int = 0
    case_sensitive: bool = True
    #: Whether an account must be imported first (70107 otherwise).
    accounts_must_exist: bool = False
    #: UserSigs issued before this time, seconds since 1970, have expired.
    signatures_from: int = 0
    #: The console's switch "push to all users" (90045 when off).
    feature_on: bool = True
    #: Whether applied writes are kept; off saves memory in long measurements.
    record: bool = True


@dataclass(frozen=True, slots=True)
class Write:
    """One user's write as applied; `at` is when its request arrived, seconds of the monotonic clock."""

    at: float
    request: int
    user: str
    attrs: Mapping[str, str | None]


@dataclass(slots=True)
class Counts:
    """Totals for reports."""

    requests: int = 0
    applied_requests: int = 0
    users: int = 0
    refused: collections.Counter[int] = field(default_factory=collections.Counter)
    faults: collections.Counter[str] = field(default_factory=collections.Counter)
    oversized: int = 0
    repeated_users: int = 0


class Refused(Exception):
    """Raised internally for a request that is refused as a whole."""

    def __init__(self, code: int, info: str) -> None:
        super().__init__(code, info)
        self.code, self.info = code, info


class _Signed(NamedTuple):
    """The content of a UserSig."""

    identifier: str
    app: int
    issued: int
    expire: int
    proof: str

    @classmethod
    def read(cls, sig: str) -> _Signed:
        """The fields of a UserSig, not yet verified."""
        try:
            document = usersig.decode(sig)
            app, issued, expire = (int(document[f"TLS.{name}"]) for name in ("sdkappid", "time", "expire"))
            owner, proof = str(document["TLS.identifier"]), str(document["TLS.sig"])
            # A lone surrogate can be neither signed nor compared.
            (owner + proof).encode()
        except (ValueError, KeyError, TypeError, OverflowError):
            raise Refused(70003, "UserSig is illegal") from None
        return cls(owner, app, issued, expire, proof)


@dataclass(frozen=True, slots=True)
class _Call:
    """One request, as the commands see it."""

    body: dict[str, Any]
    at: float
    number: int
    #: Whether it was sent to the `timpush` twin.
    push: bool
    perform: Perform
    user_codes: Mapping[str, int]


class Arrivals:
    """Counts calls in every rolling second, the strictest reading of "100 a second".

    Times may come a little out of order: a request that arrived first may be handled second.
    """

    def __init__(self) -> None:
        self._times: list[float] = []
        self._counted: list[float] = []

    def arrive(self, at: float) -> None:
        """Note an arrival, whatever becomes of it."""
        bisect.insort(self._times, at)

    def admit(self, at: float, quirks: Quirks) -> bool:
        """Whether the quota lets this call pass."""
        if not quirks.quota:
            return True
        start = at - 1 if quirks.window == "rolling" else math.floor(at) - 1e-9
        in_window = bisect.bisect_right(self._counted, at) - bisect.bisect_right(self._counted, start)
        admitted = in_window < quirks.quota
        if admitted or quirks.refused_count:
            bisect.insort(self._counted, at)
            # Nothing arrives a minute late.
            del self._counted[: bisect.bisect_left(self._counted, at - 60)]
        return admitted

    @property
    def times(self) -> list[float]:
        """Every arrival, in order."""
        return list(self._times)

    @property
    def total(self) -> int:
        return len(self._times)

    @property
    def seconds(self) -> float:
        """From the first arrival to the last."""
        return self._times[-1] - self._times[0] if self._times else 0.0

    @property
    def worst(self) -> int:
        """The most calls in any one second, excluding its end."""
        times, first, worst = self._times, 0, 0
        for last, at in enumerate(times):
            while times[first] <= at - 1:
                first += 1
            worst = max(worst, last - first + 1)
        return worst


class Api:
    """The service's state and rules, without HTTP."""

    def __init__(
        self,
        sdkappid: int,
        key: str,
        *,
        administrators: Iterable[str] = ("administrator",),
        names: Iterable[str] = (),
        quirks: Quirks | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.sdkappid, self._key, self._wall = sdkappid, key, wall
        self.administrators = set(administrators)
        self.names = list(names)
        self.quirks = quirks or Quirks()
        self.users: dict[str, dict[str, str]] = {}
        self.accounts: set[str] = set()
        self.writes: list[Write] = []
        self.counts = Counts()
        #: All calls, except reads with a quota of their own.
        self.arrivals, self.reads = Arrivals(), Arrivals()
        self._known_signatures: set[tuple[str, str]] = set()
        self._refused_signatures, self._closed_until = 0, 0.0
        self._types: dict[str, int] = {}
        commands: dict[str, Callable[[_Call], dict[str, Any]]] = {
            "set_attr": self._set,
            "remove_attr": self._remove,
            "get_attr": self._get,
            "set_attr_name": self._set_names,
            "get_attr_name": self._get_names,
        }
        self._commands = {
            f"/v4/{prefix}{name}": command
            for prefix in ("all_member_push/im_", "timpush/")
            for name, command in commands.items()
        }

    def _clock_of(self, path: str) -> Arrivals:
        return self.reads if self.quirks.reads == "apart" and path.endswith("get_attr") else self.arrivals

    def arrive(self, path: str, now: float) -> None:
        """Count a call, whatever becomes of it."""
        self._clock_of(path).arrive(now)

    def handle(
        self,
        path: str,
        query: Mapping[str, str],
        body: bytes,
        now: float,
        *,
        perform: Perform = at_once,
        user_codes: Mapping[str, int] | None = None,
    ) -> dict[str, Any]:
        """Answer one request that arrived at `now` (monotonic); `perform` is given what it writes.

        `user_codes` refuses single users. The caller counts arrivals.
        """
        try:
            command = self._commands.get(path)
            if command is None:
                raise Refused(60009, "no such command")
            self._check_url(query, now)
            if not self.quirks.feature_on:
                raise Refused(90045, "push to all users is not enabled")
            if not self._clock_of(path).admit(now, self.quirks):
                raise Refused(60007, "call frequency over the limit")
            push = path.startswith("/v4/timpush/")
            request = self._parse(body)
            call = _Call(request, now, self.counts.requests, push, perform, user_codes or {})
            return {"ActionStatus": "OK", "ErrorInfo": "", "ErrorCode": 0} | command(call)
        except Refused as refusal:
            return self.refuse(refusal.code, refusal.info)

    def refuse(self, code: int, info: str) -> dict[str, Any]:
        """The reply to a request refused as a whole."""
        self.counts.refused[code] += 1
        return {"ActionStatus": "FAIL", "ErrorInfo": info, "ErrorCode": code}

    def _parse(self, body: bytes) -> dict[str, Any]:
        limit = self.quirks.body_limit
        if limit and len(body) > limit:
            raise Refused(93000, f"body is longer than {limit}")
        try:
            text = body.decode()
            request = _decode(text)
            # Lone surrogates, which nothing can write, come only as escapes.
            if "\\u" in text:
                _encode(request).encode()
        except (ValueError, RecursionError):
            raise Refused(90001, "JSON parse error") from None
        if not isinstance(request, dict):
            raise Refused(90001, "JSON is not an object")
        return request

    # The URL: parameters, then the signature, then the administrator.

    def _check_url(self, query: Mapping[str, str], now: float) -> None:
        self._check_parameters(query)
        if now < self._closed_until:
            raise Refused(70050, "verification failed too often")
        try:
            self._check_signature(query["usersig"], query["sdkappid"], query["identifier"])
        except Refused:
            self._refused_signatures += 1
            if self._refused_signatures >= MAX_REFUSED_SIGNATURES:
                self._closed_until, self._refused_signatures = now + CLOSED_FOR, 0
            raise
        self._refused_signatures = 0
        if query["identifier"] not in self.administrators:
            raise Refused(90009, "administrator required")

    def _check_parameters(self, query: Mapping[str, str]) -> None:
        if not query.get("sdkappid"):
            raise Refused(60012, "sdkappid is missing")
        if (
            not query.get("identifier")
            or not query.get("usersig")
            or query.get("contenttype") != "json"
            or not _is_uint32(query.get("random", ""))
        ):
            raise Refused(60025, "a parameter of the URL is missing or wrong")

    def rotate_key(self, key: str) -> None:
        """Use another key from now on; signatures made with the old one are refused."""
        self._key = key
        self._known_signatures.clear()

    def _check_signature(self, sig: str, sdkappid: str, identifier: str) -> None:
        signed = _Signed.read(sig)
        if sdkappid != str(self.sdkappid):
            raise Refused(70020, "sdkappid does not exist")
        if signed.app != self.sdkappid:
            raise Refused(70014, "UserSig is of another sdkappid")
        if signed.identifier != identifier:
            raise Refused(70013, "UserSig is of another identifier")
        if (sig, identifier) not in self._known_signatures:
            self._check_proof(signed)
            self._known_signatures.add((sig, identifier))
        if self._wall() > signed.issued + signed.expire or signed.issued < self.quirks.signatures_from:
            raise Refused(70001, "UserSig has expired")

    def _check_proof(self, signed: _Signed) -> None:
        expected = usersig.signature(self._key, signed.identifier, signed.app, signed.issued, signed.expire)
        if not hmac.compare_digest(expected.encode(), signed.proof.encode()):
            raise Refused(70009, "UserSig was made with another key")

    # The commands. Each returns what it adds to the reply.

    def _set(self, call: _Call) -> dict[str, Any]:
        return self._change(call, self._check_values)

    def _remove(self, call: _Call) -> dict[str, Any]:
        return self._change(call, self._check_removed)

    def _change(
        self, call: _Call, check: Callable[[Any], tuple[dict[str, str | None], int]]
    ) -> dict[str, Any]:
        good: list[tuple[str, dict[str, str | None]]] = []
        bad: list[tuple[str, int]] = []
        for entry in self._entries(call.body):
            user, (checked, code) = entry["To_Account"], check(entry.get("Attrs"))
            code = self._check_account(call, user) or code
            if not code:
                good.append((user, checked))
            elif self.quirks.bad_user == "list" or (call.push and code == 70107):
                bad.append((user, code))
            elif self.quirks.bad_user == "batch":
                raise Refused(code, f"{user} is refused")
        if len({user for user, _ in good}) < len(good):
            self.counts.repeated_users += 1
        call.perform(lambda: self.write(good, call.at, call.number))
        return _error_list(bad)

    def _entries(self, body: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
        entries = body.get("UserAttrs")
        if not isinstance(entries, list) or not entries:
            raise Refused(90001, "UserAttrs is missing")
        self._check_count(entries)
        for entry in entries:
            if not isinstance(entry, dict):
                raise Refused(90001, "an entry of UserAttrs is not an object")
            if not isinstance(entry.get("To_Account"), str):
                raise Refused(60015, "To_Account is not a string")
            yield entry

    def _check_count(self, users: list[Any]) -> None:
        if len(users) > MAX_USERS:
            self.counts.oversized += 1
            raise Refused(90018, f"{len(users)} accounts, at most {MAX_USERS}")

    def write(
        self, changes: Iterable[tuple[str, Mapping[str, str | None]]], arrived: float, request: int
    ) -> None:
        """Apply the changes of one request; None removes an attribute."""
        self.counts.applied_requests += 1
        for user, attrs in changes:
            self.counts.users += 1
            stored = self.users.setdefault(self._stored_as(user), {})
            for name, value in attrs.items():
                if value is None:
                    stored.pop(name, None)
                else:
                    stored[name] = value
            if self.quirks.record:
                self.writes.append(Write(arrived, request, user, attrs))

    def _stored_as(self, user: str) -> str:
        return user if self.quirks.case_sensitive else user.lower()

    def _exists(self, user: str) -> bool:
        if not self.quirks.accounts_must_exist or user in self.accounts:
            return True
        return not self.quirks.case_sensitive and user.lower() in map(str.lower, self.accounts)

    def _check_account(self, call: _Call, user: str) -> int:
        if code := call.user_codes.get(user):
            return code
        registration = call.push and len(user) == REGISTRATION_ID_BYTES
        if not user or (len(user.encode()) > MAX_USER_ID_BYTES and not registration):
            return 90048
        return 0 if self._exists(user) else 70107

    def _check_values(self, attrs: Any) -> tuple[dict[str, str | None], int]:
        if not isinstance(attrs, dict) or not attrs:
            raise Refused(90001, "Attrs is not an object")
        code = 0
        for name, value in attrs.items():
            if type(value) is not str:
                if self.quirks.non_strings == "refuse":
                    code = 90033
                    continue
                value = attrs[name] = value if isinstance(value, str) else json.dumps(value)
            too_long = len(value) > MAX_VALUE_BYTES or (
                not value.isascii() and len(value.encode()) > MAX_VALUE_BYTES
            )
            empty = not value and self.quirks.empty_values == "refuse"
            if too_long or empty or (self.names and name not in self.names):
                code = 90033
        return attrs, code

    def _check_removed(self, names: Any) -> tuple[dict[str, str | None], int]:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise Refused(90001, "Attrs is not an array of names")
        unknown = bool(self.names) and any(name not in self.names for name in names)
        return dict.fromkeys(names), 90033 if unknown else 0

    def _get(self, call: _Call) -> dict[str, Any]:
        users = call.body.get("To_Account")
        if not isinstance(users, list):
            raise Refused(90001, "To_Account is not an array")
        self._check_count(users)
        if not all(isinstance(user, str) for user in users):
            raise Refused(60015, "an entry of To_Account is not a string")
        unknown = {user for user in users if call.push and not self._exists(user)}
        found = [
            {"To_Account": user, "Attrs": dict(self.users.get(self._stored_as(user), {}))}
            for user in users
            if user not in unknown
        ]
        return {"UserAttrs": found} | _error_list((user, 70107) for user in users if user in unknown)

    def _set_names(self, call: _Call) -> dict[str, Any]:
        given = call.body.get("AttrNames")
        slots = {str(number) for number in range(MAX_ATTRIBUTES)}
        if not isinstance(given, dict) or not given or not given.keys() <= slots:
            raise Refused(90001, "AttrNames is not an object with the keys 0 to 9")
        types = self._check_types(call, given)
        self._check_new_names(given.values())
        call.perform(lambda: self._add_names(given, types))
        return {}

    def _check_new_names(self, given: Iterable[Any]) -> None:
        names = list(self.names)
        for name in given:
            if not isinstance(name, str) or not 0 < len(name.encode()) <= MAX_NAME_BYTES:
                raise Refused(90033, "an attribute name is not 1 to 50 bytes")
            if name in names:
                raise Refused(90033, f"attrName:{name} already exists at index:{names.index(name)}")
            names.append(name)
        if len(names) > MAX_ATTRIBUTES:
            raise Refused(90033, f"{len(names)} attribute names, at most {MAX_ATTRIBUTES}")

    def _check_types(self, call: _Call, given: Mapping[str, Any]) -> dict[str, int]:
        types = call.body.get("AttrTypes", {}) if call.push else {}
        if not isinstance(types, dict) or not types.keys() <= given.keys():
            raise Refused(90001, "AttrTypes is not an object with the keys of AttrNames")
        if not all(type(kind) is int and kind in (0, 1) for kind in types.values()):
            raise Refused(90001, "a type is neither 0 (UserID) nor 1 (RegistrationID)")
        return types

    def _add_names(self, given: Mapping[str, str], types: Mapping[str, int]) -> None:
        self.names += given.values()
        self._types |= {given[number]: kind for number, kind in types.items()}

    def _get_names(self, call: _Call) -> dict[str, Any]:
        reply = {"AttrNames": {str(number): name for number, name in enumerate(self.names)}}
        if not call.push:
            return reply
        types = {str(number): self._types.get(name, 0) for number, name in enumerate(self.names)}
        return reply | {"AttrTypes": types}

    def state(self) -> dict[str, Any]:
        """Totals, for reports."""
        counts = {name: getattr(self.counts, name) for name in Counts.__slots__}
        return counts | {
            "users_known": len(self.users),
            "calls": self.arrivals.total,
            "worst_rolling_second": self.arrivals.worst,
            "seconds": round(self.arrivals.seconds, 3),
            "reads_apart": {"calls": self.reads.total, "worst_rolling_second": self.reads.worst},
            "names": self.names,
            "quirks": dataclasses.asdict(self.quirks),
        }


def _error_list(refused: Iterable[tuple[str, int]]) -> dict[str, Any]:
    """What a reply adds for users that were refused alone."""
    listed = [{"To_Account": user, "ErrorCode": code, "ErrorInfo": ""} for user, code in refused]
    return {"ErrorList": listed} if listed else {}


def _is_uint32(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 10 and int(text) < 2**32


class TimedStream(tornado.iostream.IOStream):
    """A connection that knows when its last bytes reached this machine.

    The kernel records that time (Linux). Ours would be the time at which this process gets round to reading, and a process
    kept waiting on a busy machine would see calls bunched that were not.
    """

    _SO_TIMESTAMPNS = 35

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.arrived: float | None = None
        if sys.platform == "linux":
            self.socket.setsockopt(socket.SOL_SOCKET, self._SO_TIMESTAMPNS, 1)

    def read_from_fd(self, buffer: bytearray | memoryview) -> int | None:
        try:
            size, ancillary, _, _ = self.socket.recvmsg_into([buffer], 64)
        except BlockingIOError:
            return None
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, self._SO_TIMESTAMPNS) and len(data) >= 16:
                seconds, nanos = struct.unpack("qq", data[:16])
                self.arrived = seconds + nanos / 1e9 + time.monotonic() - time.time()
        return size


class _Server(tornado.httpserver.HTTPServer):
    """Reads every connection with its arrival times."""

    def handle_stream(self, stream: tornado.iostream.IOStream, address: tuple[str, int]) -> None:
        super().handle_stream(TimedStream(stream.socket), address)


class _ApiHandler(tornado.web.RequestHandler):
    """Every path of the API."""

    def initialize(self, api: Api, faults: Faults) -> None:
        self._api, self._faults = api, faults

    async def post(self) -> None:
        api, request = self._api, self.request
        connection: Any = request.connection
        now = getattr(connection.stream, "arrived", None) or time.monotonic()
        if on_its_way := network.delay(api.quirks.network, now, self._faults.rng):
            now += on_its_way
            await asyncio.sleep(now - time.monotonic())
        api.arrive(request.path, now)
        api.counts.requests += 1
        query = {
            name: values[-1].decode(errors="replace") for name, values in request.query_arguments.items()
        }
        body = request.body
        fault = self._faults.strike(body)
        if fault is not None:
            api.counts.faults[fault.kind] += 1
            await self._fail(fault, query, now)
            return
        reply = _encode(api.handle(request.path, query, body, now))
        if api.quirks.latency:
            await asyncio.sleep(api.quirks.latency)
        self._finish(reply)

    def _finish(self, body: str, status: int = 200, kind: str = "application/json") -> None:
        self.set_status(status)
        self.set_header("Content-Type", kind)
        self.finish(body)

    async def _fail(self, fault: Fault, query: Mapping[str, str], now: float) -> None:
        api = self._api
        reply = self._answer(fault, query, now)
        if fault.kind in ("reset", "late_write"):
            self._reset()
            return
        await asyncio.sleep(api.quirks.latency + (fault.delay if fault.kind == "slow" else 0))
        if fault.kind == "status":
            page = "<html><body><h1>502 Bad Gateway</h1></body></html>"
            self._finish(page, fault.code or 502, "text/html")
            return
        if fault.kind == "extra_fields":
            reply |= {"RequestId": "simulated", "ErrorDisplay": "", "Unheard": {"of": [1]}}
        text = _encode(reply)
        self._finish(text[: len(text) // 2] if fault.kind == "truncated" else text)

    def _answer(self, fault: Fault, query: Mapping[str, str], now: float) -> dict[str, Any]:
        if fault.kind == "code":
            return self._api.refuse(fault.code, "on purpose")
        codes = {fault.user: fault.code} if fault.kind == "user_code" else None
        path, body, perform = self.request.path, self.request.body, self._performing(fault)
        return self._api.handle(path, query, body, now, perform=perform, user_codes=codes)

    def _performing(self, fault: Fault) -> Perform:
        if fault.kind == "late_write":
            return functools.partial(asyncio.get_running_loop().call_later, fault.delay)
        fails = fault.kind in ("status", "reset", "lost")
        return never if fails and not fault.applied else at_once

    def _reset(self) -> None:
        connection: Any = self.request.connection
        stream: tornado.iostream.IOStream = connection.detach()
        # With a linger time of 0, the kernel sends a reset instead of closing cleanly.
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.close()
        self._finished = True

    def get(self) -> None:
        reply = {"ActionStatus": "FAIL", "ErrorInfo": "POST only", "ErrorCode": 60009}
        self._finish(_encode(reply))

    head = put = patch = delete = options = get


class _ControlHandler(tornado.web.RequestHandler):
    """Our own paths: show the state and the record, set quirks and faults."""

    def initialize(self, api: Api, faults: Faults) -> None:
        self._api, self._faults = api, faults

    def get(self, what: str) -> None:
        api = self._api
        self.set_header("Content-Type", "application/json")
        if what == "state":
            self.finish(_encode(api.state()))
        elif what == "users":
            self.finish(_encode(api.users))
        elif what == "arrivals":
            self.finish(_encode(api.arrivals.times))
        elif what == "faults":
            self.finish(json.dumps(self._faults.as_json()))
        elif what == "record":
            self.finish("".join(_encode(dataclasses.astuple(write)) + "\n" for write in api.writes))
        else:
            self.send_error(404)

    def post(self, what: str) -> None:
        given = json.loads(self.request.body)
        if what == "quirks":
            self._api.quirks = dataclasses.replace(self._api.quirks, **given)
        elif what == "faults":
            self._faults.replace(Fault(**fault) for fault in given)
        elif what == "accounts":
            self._api.accounts.update(given)
        elif what == "users":
            # As if written by somebody else: not counted, and not in the record.
            self._api.users.update(given)
        elif what == "names":
            self._api.names = list(given)
        elif what == "administrators":
            self._api.administrators = set(given)
        elif what == "key":
            self._api.rotate_key(given)
        elif what == "reset-arrivals":
            self._api.arrivals, self._api.reads = Arrivals(), Arrivals()
        else:
            self.send_error(404)
            return
        self.finish("{}")


def make_server(api: Api, faults: Faults) -> tornado.httpserver.HTTPServer:
    """The simulator as a web server that does not listen yet."""
    parts = {"api": api, "faults": faults}
    paths = [(r"/simulator/([a-z-]+)", _ControlHandler, parts), (r"/.*", _ApiHandler, parts)]
    return _Server(tornado.web.Application(paths, log_function=lambda _: None))


def serve(
    api: Api, faults: Faults, *, port: int, host: str = "127.0.0.1", ready: Callable[[], None] = lambda: None
) -> None:
    """Serve until the process is asked to stop."""

    async def main() -> None:
        make_server(api, faults).listen(port, host)
        ready()
        await asyncio.Event().wait()

    # A long pause of the garbage collector would delay replies; the record has no cycles.
    gc.set_threshold(200_000, 50, 1000)
    asyncio.run(main())
