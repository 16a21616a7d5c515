"""A faithful stand-in for the user-attribute API, which can also fail on purpose.

`Api` holds what the real service would: accounts, attributes, signatures, quotas, and answers requests by
the documented rules, in the order that independent clients suggest. `make_server` puts it behind HTTP and
adds latency and faults. What the documents leave open is a switch (`Quirks`), so that a client can be
tested under every reading. Every applied write is recorded with its arrival: tests and the demo use that
record, not the product's own counters, to judge the product.

Documents: 1047/37170 (set), 37171 (remove), 37169 (get), 37167/37168 (names), 60565 (the `timpush` twins),
1047/34348 (codes). `/simulator/...` is ours: state, quirks, faults, record.
"""

from __future__ import annotations

import asyncio
import bisect
import collections
import dataclasses
import gc
import hmac
import json
import math
import random
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import tornado.httpserver
import tornado.iostream
import tornado.web

from worker import usersig
from worker.models import MAX_ATTRIBUTES, MAX_NAME_BYTES, MAX_USER_ID_BYTES, MAX_VALUE_BYTES

MAX_USERS = 100
#: Refused signatures in a row after which verification is closed (70050), and for how long, seconds.
MAX_REFUSED_SIGNATURES = 20
CLOSED_FOR = 60.0
REGISTRATION_ID_BYTES = 36

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(slots=True)
class Quirks:
    """What the documents leave open, and what a test wants to set."""

    #: Calls a second; 0 = no limit.
    quota: int = 100
    #: Seconds until a reply.
    latency: float = 0.0
    #: One bad user or value: the whole batch is refused, it appears in ErrorList, or is skipped silently.
    bad_user: Literal["batch", "list", "silent"] = "batch"
    #: The quota counts in every rolling second, or from one full second to the next.
    window: Literal["rolling", "fixed"] = "rolling"
    #: Whether refused calls count against the quota.
    refused_count: bool = True
    empty_values: Literal["refuse", "accept"] = "refuse"
    non_strings: Literal["refuse", "coerce"] = "refuse"
    #: Most bytes of a body; 0 = no limit.
    body_limit: int = 0
    case_sensitive: bool = True
    #: Whether an account must be imported first (70107 otherwise).
    accounts_must_exist: bool = False
    #: The console's switch "push to all users" (90045 when off).
    feature_on: bool = True
    #: Whether applied writes are kept; off saves memory in long measurements.
    record: bool = True


@dataclass(slots=True)
class Fault:
    """Something that goes wrong on purpose; the first one that fits a request strikes.

    kind: `status` (HTTP status `code`, HTML body), `reset` (connection reset), `slow` (the reply comes
    `delay` s late), `truncated` (JSON cut short), `late_write` (connection reset, applied `delay` s later),
    `code` (refused with ErrorCode `code`), `user_code` (`user` refused with `code`, as `bad_user` says),
    `extra_fields`. `applied` says whether the write of a failing request took place.
    """

    kind: Literal["status", "reset", "slow", "truncated", "late_write", "code", "user_code", "extra_fields"]
    code: int = 0
    user: str = ""
    #: How many requests it strikes; None = all.
    times: int | None = 1
    chance: float = 1.0
    delay: float = 0.0
    applied: bool = False


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
    """Raised inside for a request refused as a whole."""

    def __init__(self, code: int, info: str) -> None:
        super().__init__(code, info)
        self.code, self.info = code, info


class Arrivals:
    """Counts calls in every rolling second, the strictest reading of "100 a second".

    Times may come a little out of order: a request that arrived first may be looked at second.
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
    def total(self) -> int:
        return len(self._times)

    @property
    def seconds(self) -> float:
        """From the first arrival to the last."""
        return self._times[-1] - self._times[0] if self._times else 0.0

    @property
    def worst(self) -> int:
        """Most calls in any one second, its end not included."""
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
        self.arrivals = Arrivals()
        self._known_signatures: set[tuple[str, str]] = set()
        self._refused_signatures, self._closed_until = 0, 0.0
        self._commands: dict[str, Callable[[Any, float, bool], dict[str, Any]]] = {}
        for family, set_, remove, get, set_names, get_names in (
            (
                "all_member_push",
                "im_set_attr",
                "im_remove_attr",
                "im_get_attr",
                "im_set_attr_name",
                "im_get_attr_name",
            ),
            ("timpush", "set_attr", "remove_attr", "get_attr", "set_attr_name", "get_attr_name"),
        ):
            self._commands |= {
                f"/v4/{family}/{set_}": self._set,
                f"/v4/{family}/{remove}": self._remove,
                f"/v4/{family}/{get}": self._get,
                f"/v4/{family}/{set_names}": self._set_names,
                f"/v4/{family}/{get_names}": self._get_names,
            }

    def handle(
        self,
        path: str,
        query: Mapping[str, str],
        body: bytes,
        now: float,
        *,
        apply: bool = True,
        user_codes: Mapping[str, int] | None = None,
    ) -> dict[str, Any]:
        """Answer one request that arrived at `now` (monotonic); with `apply` false nothing is written.

        `user_codes` refuses single users. Counting arrivals is the caller's part.
        """
        self._user_codes = user_codes or {}
        try:
            command = self._commands.get(path)
            if command is None:
                raise Refused(60009, "no such command")
            self._check_url(query, now)
            if not self.quirks.feature_on:
                raise Refused(90045, "push to all users is not enabled")
            if not self.arrivals.admit(now, self.quirks):
                raise Refused(60007, "call frequency over the limit")
            limit = self.quirks.body_limit
            if limit and len(body) > limit:
                raise Refused(93000, f"body is longer than {limit}")
            try:
                request = json.loads(body)
            except ValueError:
                raise Refused(90001, "JSON parse error") from None
            if not isinstance(request, dict):
                raise Refused(90001, "JSON is not an object")
            return {"ActionStatus": "OK", "ErrorInfo": "", "ErrorCode": 0} | command(request, now, apply)
        except Refused as refusal:
            self.counts.refused[refusal.code] += 1
            return {"ActionStatus": "FAIL", "ErrorInfo": refusal.info, "ErrorCode": refusal.code}

    # The URL: parameters, then the signature, then the administrator.

    def _check_url(self, query: Mapping[str, str], now: float) -> None:
        if not query.get("sdkappid"):
            raise Refused(60012, "sdkappid is missing")
        number = query.get("random", "")
        if (
            not query.get("identifier")
            or not query.get("usersig")
            or query.get("contenttype") != "json"
            or not (number.isdecimal() and int(number) < 2**32)
        ):
            raise Refused(60025, "a parameter of the URL is missing or wrong")
        if query["sdkappid"] != str(self.sdkappid):
            raise Refused(70020, "sdkappid does not exist")
        if now < self._closed_until:
            raise Refused(70050, "verification failed too often")
        try:
            self._check_signature(query["usersig"], query["identifier"])
        except Refused:
            self._refused_signatures += 1
            if self._refused_signatures >= MAX_REFUSED_SIGNATURES:
                self._closed_until, self._refused_signatures = now + CLOSED_FOR, 0
            raise
        self._refused_signatures = 0
        if query["identifier"] not in self.administrators:
            raise Refused(90009, "administrator required")

    def rotate_key(self, key: str) -> None:
        """Use another key from now on; signatures made with the old one are refused."""
        self._key = key
        self._known_signatures.clear()

    def _check_signature(self, sig: str, identifier: str) -> None:
        try:
            document = usersig.decode(sig)
            app, issued, expire = (int(document[f"TLS.{name}"]) for name in ("sdkappid", "time", "expire"))
            owner, proof = str(document["TLS.identifier"]), str(document["TLS.sig"])
        except (ValueError, KeyError, TypeError):
            raise Refused(70003, "UserSig is illegal") from None
        if app != self.sdkappid:
            raise Refused(70014, "UserSig is of another sdkappid")
        if owner != identifier:
            raise Refused(70013, "UserSig is of another identifier")
        if (sig, identifier) not in self._known_signatures:
            expected = usersig.signature(self._key, owner, app, issued, expire)
            if not hmac.compare_digest(expected.encode(), proof.encode()):
                raise Refused(70009, "UserSig was made with another key")
            self._known_signatures.add((sig, identifier))
        if self._wall() > issued + expire:
            raise Refused(70001, "UserSig has expired")

    # The commands. Each gets the parsed body and returns what it adds to the reply.

    def _set(self, request: dict[str, Any], now: float, apply: bool) -> dict[str, Any]:
        return self._change(request, now, apply, self._check_values)

    def _remove(self, request: dict[str, Any], now: float, apply: bool) -> dict[str, Any]:
        return self._change(request, now, apply, self._check_removed)

    def _change(
        self,
        request: dict[str, Any],
        now: float,
        apply: bool,
        check: Callable[[Any], tuple[dict[str, str | None], int]],
    ) -> dict[str, Any]:
        entries = request.get("UserAttrs")
        if not isinstance(entries, list) or not entries:
            raise Refused(90001, "UserAttrs is missing")
        if len(entries) > MAX_USERS:
            self.counts.oversized += 1
            raise Refused(90018, f"{len(entries)} accounts, at most {MAX_USERS}")
        good: list[tuple[str, dict[str, str | None]]] = []
        bad: list[dict[str, Any]] = []
        for entry in entries:
            if not isinstance(entry, dict):
                raise Refused(90001, "an entry of UserAttrs is no object")
            user, attrs = entry.get("To_Account"), entry.get("Attrs")
            if not isinstance(user, str):
                raise Refused(60015, "To_Account is no string")
            checked, code = check(attrs)
            code = self._check_account(user) or code
            if not code:
                good.append((user, checked))
            elif self.quirks.bad_user == "batch":
                raise Refused(code, f"{user} is refused")
            elif self.quirks.bad_user == "list":
                bad.append({"To_Account": user, "ErrorCode": code, "ErrorInfo": ""})
        if len({user for user, _ in good}) < len(good):
            self.counts.repeated_users += 1
        if apply:
            self.write(good, now)
        return {"ErrorList": bad} if bad else {}

    def write(self, changes: Iterable[tuple[str, Mapping[str, str | None]]], arrived: float) -> None:
        """Apply changes; None removes an attribute."""
        self.counts.applied_requests += 1
        for user, attrs in changes:
            self.counts.users += 1
            stored = self.users.setdefault(user if self.quirks.case_sensitive else user.lower(), {})
            for name, value in attrs.items():
                if value is None:
                    stored.pop(name, None)
                else:
                    stored[name] = value
            if self.quirks.record:
                self.writes.append(Write(arrived, self.counts.requests, user, attrs))

    def _check_account(self, user: str) -> int:
        if code := self._user_codes.get(user):
            return code
        if not user or (len(user.encode()) > MAX_USER_ID_BYTES and len(user) != REGISTRATION_ID_BYTES):
            return 90048
        if self.quirks.accounts_must_exist and user not in self.accounts:
            return 70107
        return 0

    def _check_values(self, attrs: Any) -> tuple[dict[str, str | None], int]:
        if not isinstance(attrs, dict) or not attrs:
            raise Refused(90001, "Attrs is no object")
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
            raise Refused(90001, "Attrs is no array of names")
        unknown = bool(self.names) and any(name not in self.names for name in names)
        return dict.fromkeys(names), 90033 if unknown else 0

    def _get(self, request: dict[str, Any], now: float, apply: bool) -> dict[str, Any]:
        users = request.get("To_Account")
        if not isinstance(users, list) or not all(isinstance(user, str) for user in users):
            raise Refused(90001, "To_Account is no array of strings")
        if len(users) > MAX_USERS:
            raise Refused(90018, f"{len(users)} accounts, at most {MAX_USERS}")
        return {"UserAttrs": [{"To_Account": user, "Attrs": self.users.get(user, {})} for user in users]}

    def _set_names(self, request: dict[str, Any], now: float, apply: bool) -> dict[str, Any]:
        given = request.get("AttrNames")
        slots = {str(number) for number in range(MAX_ATTRIBUTES)}
        if not isinstance(given, dict) or not given or not given.keys() <= slots:
            raise Refused(90001, "AttrNames is no object with the keys 0 to 9")
        for name in given.values():
            if not isinstance(name, str) or not 0 < len(name.encode()) <= MAX_NAME_BYTES:
                raise Refused(90033, "an attribute name is not 1 to 50 bytes")
            if name in self.names:
                raise Refused(90033, f"attrName:{name} already exists at index:{self.names.index(name)}")
        if apply:
            self.names += given.values()
        return {}

    def _get_names(self, request: dict[str, Any], now: float, apply: bool) -> dict[str, Any]:
        return {"AttrNames": {str(number): name for number, name in enumerate(self.names)}}

    def state(self) -> dict[str, Any]:
        """Totals, for reports."""
        counts = {name: getattr(self.counts, name) for name in Counts.__slots__}
        return counts | {
            "users_known": len(self.users),
            "calls": self.arrivals.total,
            "worst_rolling_second": self.arrivals.worst,
            "seconds": round(self.arrivals.seconds, 3),
            "names": self.names,
            "quirks": dataclasses.asdict(self.quirks),
        }


class Faults:
    """The faults that wait for their request."""

    def __init__(self, seed: int = 0) -> None:
        self._faults: list[Fault] = []
        self._rng = random.Random(seed)

    def replace(self, faults: Iterable[Fault]) -> None:
        self._faults = list(faults)

    def strike(self, body: bytes) -> Fault | None:
        """The fault for this request, used up once."""
        for fault in self._faults:
            if fault.times == 0 or (fault.user and f'"{fault.user}"'.encode() not in body):
                continue
            if fault.chance < 1 and self._rng.random() >= fault.chance:
                continue
            if fault.times is not None:
                fault.times -= 1
            return fault
        return None


class _TimedStream(tornado.iostream.IOStream):
    """A connection that knows when its last bytes reached this machine.

    The kernel notes that time (Linux). Ours would be the time at which this process got round to look,
    and a process that is kept waiting on a busy machine sees calls bunched that were not.
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
        super().handle_stream(_TimedStream(stream.socket), address)


class _ApiHandler(tornado.web.RequestHandler):
    """Every path of the API."""

    def initialize(self, api: Api, faults: Faults) -> None:
        self._api, self._faults = api, faults

    async def post(self) -> None:
        api, request = self._api, self.request
        connection: Any = request.connection
        now = getattr(connection.stream, "arrived", None) or time.monotonic()
        api.arrivals.arrive(now)
        api.counts.requests += 1
        query = {name: values[-1].decode() for name, values in request.query_arguments.items()}
        body = request.body
        fault = self._faults.strike(body)
        if fault is not None:
            api.counts.faults[fault.kind] += 1
            await self._fail(fault, query, now)
            return
        reply = api.handle(request.path, query, body, now)
        if api.quirks.latency:
            await asyncio.sleep(api.quirks.latency)
        self._finish(_encode(reply))

    def _finish(self, body: str, status: int = 200, kind: str = "application/json") -> None:
        self.set_status(status)
        self.set_header("Content-Type", kind)
        self.finish(body)

    async def _fail(self, fault: Fault, query: Mapping[str, str], now: float) -> None:
        api, path, body = self._api, self.request.path, self.request.body
        if fault.kind == "code":
            api.counts.refused[fault.code] += 1
            reply: dict[str, Any] = {
                "ActionStatus": "FAIL",
                "ErrorInfo": "on purpose",
                "ErrorCode": fault.code,
            }
        elif fault.kind == "user_code":
            reply = api.handle(path, query, body, now, user_codes={fault.user: fault.code})
        else:
            applied = fault.applied or fault.kind in ("slow", "truncated", "extra_fields")
            reply = api.handle(path, query, body, now, apply=applied)
        if fault.kind == "late_write" and reply["ErrorCode"] == 0:
            asyncio.get_running_loop().call_later(fault.delay, self._write_late, body, now)
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

    def _write_late(self, body: bytes, arrived: float) -> None:
        entries = json.loads(body)["UserAttrs"]
        self._api.write([(entry["To_Account"], entry["Attrs"]) for entry in entries], arrived)

    def _reset(self) -> None:
        connection: Any = self.request.connection
        stream: tornado.iostream.IOStream = connection.detach()
        # Lingering for no time makes the kernel send a reset instead of an orderly end.
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.close()
        self._finished = True

    def get(self) -> None:
        reply = {"ActionStatus": "FAIL", "ErrorInfo": "POST only", "ErrorCode": 60009}
        self._finish(_encode(reply))


class _ControlHandler(tornado.web.RequestHandler):
    """Ours: look at the state and the record, set quirks and faults."""

    def initialize(self, api: Api, faults: Faults) -> None:
        self._api, self._faults = api, faults

    def get(self, what: str) -> None:
        api = self._api
        self.set_header("Content-Type", "application/json")
        if what == "state":
            self.finish(_encode(api.state()))
        elif what == "users":
            self.finish(_encode(api.users))
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
        elif what == "key":
            self._api.rotate_key(given)
        elif what == "reset-arrivals":
            self._api.arrivals = Arrivals()
        else:
            self.send_error(404)
            return
        self.finish("{}")


def make_server(api: Api, faults: Faults) -> tornado.httpserver.HTTPServer:
    """The simulator as a web server that listens nowhere yet."""
    parts = {"api": api, "faults": faults}
    paths = [(r"/simulator/([a-z-]+)", _ControlHandler, parts), (r"/.*", _ApiHandler, parts)]
    return _Server(tornado.web.Application(paths, log_function=lambda _: None))


def serve(api: Api, *, port: int, host: str = "127.0.0.1", ready: Callable[[], None] = lambda: None) -> None:
    """Serve until the process is asked to stop."""

    async def main() -> None:
        make_server(api, Faults()).listen(port, host)
        ready()
        await asyncio.Event().wait()

    # A long pause of the collector would delay replies; the record holds no cycles.
    gc.set_threshold(200_000, 50, 1000)
    asyncio.run(main())
