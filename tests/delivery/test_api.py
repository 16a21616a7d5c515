"""The HTTP edge, over real sockets: one call, every reading of its answer, and nothing that leaks."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import select
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import pytest
import structlog

from tests.conftest import SECRET_KEY
from tests.simulation import APP, Simulation, simulation
from worker import logs
from worker.delivery.answers import UNNUMBERED, Answer, Failure, NoReply, Reply, UserError, read_reply
from worker.delivery.api import Call, ChatApi
from worker.delivery.usersig import Signer, decode
from worker.models import Attributes
from worker.sandbox.faults import Fault
from worker.sandbox.redis_server import free_port

USERS: list[tuple[str, Attributes]] = [("ann", {"city": "深圳"}), ("bob", {"level": "Gold"})]


@pytest.fixture(scope="module")
def simulated() -> Iterator[Simulation]:
    with simulation() as running:
        yield running


@pytest.fixture
def tls(tmp_path: Path) -> Iterator[socket.socket]:
    """A server of TLS whose certificate is its own."""
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "1",
            "-subj",
            "/CN=127.0.0.1",
            "-keyout",
            str(tmp_path / "key.pem"),
            "-out",
            str(tmp_path / "cert.pem"),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        context.wrap_socket(server, server_side=True) as secure,
    ):

        def accept() -> None:
            with contextlib.suppress(OSError):
                secure.accept()

        threading.Thread(target=accept, daemon=True).start()
        yield secure


@pytest.fixture(autouse=True)
def no_faults(simulated: Simulation) -> None:
    simulated.fail()


def make_client(url: str, **options: Any) -> ChatApi:
    signer = Signer(lambda: SECRET_KEY, "administrator", APP)
    defaults = {"connect_timeout": 1.0, "read_timeout": 1.0}
    return ChatApi(url, signer, sdkappid=APP, identifier="administrator", **defaults | options)


def prepare(client: ChatApi) -> Call:
    call = client.prepare_set(USERS)
    assert not isinstance(call, NoReply)
    return call


def call(client: ChatApi) -> Answer:
    prepared = client.prepare_set(USERS)
    if isinstance(prepared, NoReply):
        return prepared
    prepared.send()
    return prepared.answer()


class Wire:
    """A server of a few lines that answers each request with given bytes, and keeps what it read."""

    def __init__(self, answer: Callable[[socket.socket], None]) -> None:
        self.requests: list[bytes] = []
        self.connections = 0
        self._answer = answer
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        # The answer itself may have closed the connection.
        with contextlib.suppress(OSError), connection:
            while data := self._read(connection):
                self.requests.append(data)
                self._answer(connection)

    def _read(self, connection: socket.socket) -> bytes:
        data = b""
        while b"\r\n\r\n" not in data:
            more = connection.recv(65_536)
            if not more:
                return b""
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        while len(body) < length:
            body += connection.recv(65_536)
        return head + b"\r\n\r\n" + body

    def close(self) -> None:
        self._server.close()


@contextlib.contextmanager
def wire(answer: Callable[[socket.socket], None]) -> Iterator[Wire]:
    server = Wire(answer)
    try:
        yield server
    finally:
        server.close()


def http(body: bytes, status: str = "200 OK", length: int | None = None, extra: str = "") -> bytes:
    size = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {size}\r\n{extra}\r\n".encode() + body


OK = http(b'{"ActionStatus":"OK","ErrorInfo":"","ErrorCode":0}')


def saying(data: bytes) -> Callable[[socket.socket], None]:
    return lambda connection: connection.sendall(data)


def test_a_call_is_what_the_documents_say() -> None:
    with wire(saying(OK)) as server:
        assert call(make_client(f"{server.url}/")) == Reply(0)

        head, _, body = server.requests[0].partition(b"\r\n\r\n")
    line = head.decode().splitlines()[0]
    path, _, query = line.split()[1].partition("?")
    parameters = dict(pair.split("=") for pair in query.split("&"))
    assert line.startswith("POST ")
    assert path == "/v4/all_member_push/im_set_attr"
    assert parameters.keys() == {"sdkappid", "identifier", "usersig", "random", "contenttype"}
    assert (parameters["sdkappid"], parameters["contenttype"]) == (str(APP), "json")
    assert 0 <= int(parameters["random"]) < 2**32
    assert decode(parameters["usersig"].replace("%2A", "*"))["TLS.identifier"] == "administrator"
    assert body.decode() == (
        '{"UserAttrs":[{"To_Account":"ann","Attrs":{"city":"深圳"}},{"To_Account":"bob","Attrs":{"level":"Gold"}}]}'
    )


@pytest.mark.parametrize("api", ["chat", "push"])
def test_both_endpoints_apply_the_values(api: str, simulated: Simulation) -> None:
    simulated.api.users.clear()

    assert call(make_client(simulated.url, api=api)) == Reply(0)

    assert simulated.api.users == {user: dict(attrs) for user, attrs in USERS}


def test_a_thread_keeps_its_connection_and_another_has_its_own() -> None:
    with wire(saying(OK)) as server:
        client = make_client(server.url)
        call(client)
        call(client)
        assert server.connections == 1

        thread = threading.Thread(target=call, args=(client,))
        thread.start()
        thread.join()
        assert server.connections == 2


def test_a_prepared_call_has_its_connection_and_nothing_is_sent() -> None:
    with wire(saying(OK)) as server:
        client = make_client(server.url)
        seen: list[tuple[int, int]] = []

        for _ in range(2):
            prepared = prepare(client)
            # The accepting thread may need a moment; the connection is there before that.
            threading.Event().wait(0.05)
            seen.append((server.connections, len(server.requests)))
            prepared.send()
            prepared.answer()

    assert seen == [(1, 0), (1, 1)]


def test_a_call_that_was_abandoned_is_never_sent_and_the_next_one_works(simulated: Simulation) -> None:
    client = make_client(simulated.url)
    before = simulated.api.counts.requests

    prepare(client).abandon()

    assert simulated.api.counts.requests == before
    assert call(client) == Reply(0)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"ActionStatus": "OK", "ErrorCode": 0, "ErrorInfo": ""}, Reply(0)),
        ({"ActionStatus": "FAIL", "ErrorCode": 90033, "ErrorInfo": "no"}, Reply(90033, "no")),
        ({"ActionStatus": "OK", "ErrorCode": 91000}, Reply(91000)),
        ({"ActionStatus": "FAIL", "ErrorCode": 0}, Reply(UNNUMBERED)),
        ({"ErrorCode": 0}, Reply(UNNUMBERED)),
        ({"ActionStatus": "OK", "ErrorCode": 0, "RequestId": "r1", "New": [1]}, Reply(0, request_id="r1")),
        (
            {"ActionStatus": "OK", "ErrorCode": 0, "ErrorList": [{"To_Account": "ann", "ErrorCode": 70107}]},
            Reply(0, errors={"ann": UserError(70107, "")}),
        ),
        (
            {"ActionStatus": "OK", "ErrorCode": 0, "ErrorList": [{"To_Account": "ann", "ErrorInfo": "why"}]},
            Reply(0, errors={"ann": UserError(UNNUMBERED, "why")}),
        ),
        (
            {
                "ActionStatus": "OK",
                "ErrorCode": 0,
                "ErrorList": [
                    {"To_Account": "ann", "ErrorCode": 0},
                    {"ErrorCode": 1},
                    "x",
                    {"To_Account": 3},
                ],
            },
            Reply(0),
        ),
        ({"ActionStatus": "OK", "ErrorCode": 0, "ErrorList": None}, Reply(0)),
        ({"ActionStatus": "OK", "ErrorCode": 0, "ErrorList": {"ann": 1}}, NoReply(Failure.UNREADABLE)),
        ({"ActionStatus": "OK"}, NoReply(Failure.UNREADABLE)),
        ({"ActionStatus": "OK", "ErrorCode": "0"}, NoReply(Failure.UNREADABLE)),
        ({"ActionStatus": "OK", "ErrorCode": False}, NoReply(Failure.UNREADABLE)),
        ([], NoReply(Failure.UNREADABLE)),
        (None, NoReply(Failure.UNREADABLE)),
    ],
)
def test_an_answer_is_read_completely(body: object, expected: Answer) -> None:
    assert read_reply(json.dumps(body).encode()) == expected


@pytest.mark.parametrize("body", [b"", b"<html>", b'{"ErrorCode":0', b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_is_unreadable(body: bytes) -> None:
    assert read_reply(body) == NoReply(Failure.UNREADABLE)


SIMULATED = [
    (Fault("status", code=502), NoReply(Failure.HTTP_STATUS, http_status=502)),
    (Fault("status", code=302), NoReply(Failure.HTTP_STATUS, http_status=302)),
    (Fault("reset"), NoReply(Failure.BROKEN)),
    (Fault("reset", applied=True), NoReply(Failure.BROKEN)),
    (Fault("late_write", delay=0.01), NoReply(Failure.BROKEN)),
    (Fault("truncated"), NoReply(Failure.UNREADABLE)),
    (Fault("slow", delay=1.2), NoReply(Failure.TIMEOUT)),
    (Fault("code", code=60007), Reply(60007, "on purpose")),
    (Fault("user_code", user="ann", code=70107), Reply(70107, "ann is refused")),
    (Fault("extra_fields"), Reply(0, request_id="simulated")),
]


@pytest.mark.parametrize(("fault", "expected"), SIMULATED, ids=lambda value: str(value)[:40])
def test_a_failure_becomes_a_value(fault: Fault, expected: Answer, simulated: Simulation) -> None:
    client = make_client(simulated.url)
    simulated.fail(fault)

    assert call(client) == expected
    assert call(client) == Reply(0), "and the next call works"


def drip(connection: socket.socket) -> None:
    try:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
        for _ in range(60):
            threading.Event().wait(0.1)
            connection.sendall(b" ")
    except OSError:
        pass


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (saying(http(b'{"Erro', length=60)), Failure.TIMEOUT),
        (drip, Failure.TIMEOUT),
        (
            lambda connection: connection.sendall(http(b'{"Erro', length=60)) or connection.close(),
            Failure.BROKEN,
        ),
        (lambda connection: connection.close(), Failure.BROKEN),
        (saying(b"not http at all\r\n\r\n"), Failure.BROKEN),
        (saying(http(b" " * 1_000_100)), Failure.BROKEN),
    ],
    ids=["stalls", "drips", "cut short", "closed", "no http", "endless"],
)
def test_a_broken_answer_becomes_a_value(answer: Callable[[socket.socket], None], failure: Failure) -> None:
    with wire(answer) as server:
        client = make_client(server.url, connect_timeout=0.3, read_timeout=0.3)

        assert call(client) == NoReply(failure)


def test_a_redirect_is_not_followed(simulated: Simulation) -> None:
    before = simulated.api.counts.requests
    with wire(saying(http(b"", "302 Found", extra=f"Location: {simulated.url}\r\n"))) as server:
        assert call(make_client(server.url)) == NoReply(Failure.HTTP_STATUS, http_status=302)
    assert simulated.api.counts.requests == before


def test_a_refused_connection_was_never_sent() -> None:
    client = make_client(f"http://127.0.0.1:{free_port()}")

    assert call(client) == NoReply(Failure.UNREACHABLE, sent=False)


def test_a_refused_signature_is_renewed(simulated: Simulation) -> None:
    moments = iter([1_700_000_000, 1_700_000_000, 1_900_000_000, 1_900_000_000])
    signer = Signer(lambda: SECRET_KEY, "administrator", APP, now=lambda: next(moments))
    client = ChatApi(simulated.url, signer, sdkappid=APP, identifier="administrator")

    assert call(client) == Reply(70001, "UserSig has expired")
    client.renew_signature()
    assert call(client) == Reply(0)


def test_no_failure_shows_a_secret(
    simulated: Simulation, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    # As the product runs: urllib3 alone would write the URL.
    quiet = logging.getLogger("urllib3")
    quiet.setLevel(logging.ERROR)
    usersig = Signer(lambda: SECRET_KEY, "administrator", APP).current().text
    shown = []
    try:
        for fault, _ in SIMULATED:
            simulated.fail(fault)
            shown.append(repr(call(make_client(simulated.url))))
        dead = (f"http://127.0.0.1:{free_port()}", "http://host.invalid", "https://127.0.0.1:1")
        shown += [repr(call(make_client(url))) for url in dead]
    finally:
        quiet.setLevel(logging.NOTSET)

    text = "".join(shown) + caplog.text + "".join(capsys.readouterr())
    assert len(shown) == len(SIMULATED) + 3
    assert SECRET_KEY not in text
    assert "usersig" not in text
    assert usersig[:40] not in text


# More of the wire.


def parameters_of(request: bytes) -> dict[str, str]:
    """The query of a request as it was sent."""
    target = request.split(b" ", 2)[1].decode()
    return dict(pair.split("=", 1) for pair in target.partition("?")[2].split("&"))


@pytest.mark.parametrize(
    ("api", "path"),
    [("chat", b"/v4/all_member_push/im_set_attr?"), ("push", b"/v4/timpush/set_attr?")],
    ids=["chat", "push"],
)
def test_each_endpoint_has_its_own_path(api: str, path: bytes) -> None:
    with wire(saying(OK)) as server:
        call(make_client(server.url, api=api))

        assert server.requests[0].startswith(b"POST " + path)


def test_random_is_new_for_every_call() -> None:
    with wire(saying(OK)) as server:
        client = make_client(server.url)

        call(client)
        call(client)

        assert len({parameters_of(request)["random"] for request in server.requests}) == 2


def test_a_signature_is_kept_until_it_is_renewed() -> None:
    seconds = itertools.count(1_700_000_000)
    signer = Signer(lambda: SECRET_KEY, "administrator", APP, now=lambda: next(seconds))
    with wire(saying(OK)) as server:
        client = ChatApi(server.url, signer, sdkappid=APP, identifier="administrator")

        call(client)
        call(client)
        client.renew_signature()
        call(client)

        first, second, third = (parameters_of(request)["usersig"] for request in server.requests)
    assert first == second
    assert third != first


def answer_once(connection: socket.socket) -> None:
    with contextlib.suppress(OSError), connection:
        connection.recv(65_536)
        connection.sendall(http(b'{"ActionStatus":"OK","ErrorCode":0}', extra="Connection: close\r\n"))
        while connection.recv(65_536):
            pass


def test_not_one_byte_arrives_before_the_call_is_sent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)
        prepared = prepare(make_client(f"http://127.0.0.1:{server.getsockname()[1]}"))
        connection, _ = server.accept()
        readable, _, _ = select.select([connection], [], [], 0.1)
        threading.Thread(target=answer_once, args=(connection,)).start()
        prepared.send()

        assert prepared.answer() == Reply(0)

    assert not readable


def test_a_request_leaves_in_one_write(simulated: Simulation) -> None:
    # Between two, other threads get their turn, and the call arrives late.
    writes: list[bytes] = []
    client = make_client(simulated.url)
    for _ in range(2):
        prepared: Any = prepare(client)
        connection = prepared._exchange._connection
        connection.sock = connection.sock if writes else Written(connection.sock, writes)
        prepared.send()
        assert prepared.answer() == Reply(0)

    assert len(writes) == 2
    assert all(data.startswith(b"POST /v4/all_member_push/im_set_attr?") for data in writes)
    assert all(data.endswith(b'"Attrs":{"level":"Gold"}}]}') for data in writes)


class Written:
    """A socket that keeps what is written to it."""

    def __init__(self, sock: socket.socket, writes: list[bytes]) -> None:
        self._sock, self._writes = sock, writes

    def sendall(self, data: bytes) -> None:
        self._writes.append(data)
        self._sock.sendall(data)

    def send(self, data: bytes) -> int:
        self._writes.append(data)
        return self._sock.send(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


@pytest.mark.parametrize("fault", [Fault("reset"), Fault("status", code=502), Fault("truncated")], ids=str)
def test_a_failed_call_is_not_repeated(fault: Fault, simulated: Simulation) -> None:
    client = make_client(simulated.url)
    call(client)
    before = simulated.api.counts.requests
    simulated.fail(fault)

    assert isinstance(call(client), NoReply)

    assert simulated.api.counts.requests == before + 1


def test_without_a_connection_there_is_nothing_to_send() -> None:
    client = make_client(f"http://127.0.0.1:{free_port()}")

    assert client.prepare_set(USERS) == NoReply(Failure.UNREACHABLE, sent=False)


def test_a_call_abandoned_on_a_kept_connection_does_no_harm() -> None:
    with wire(saying(OK)) as server:
        client = make_client(server.url)
        call(client)

        prepare(client).abandon()

        assert call(client) == Reply(0)
        assert len(server.requests) == 2


def test_waiting_long_for_the_slot_does_not_make_a_good_reply_late() -> None:
    with wire(saying(OK)) as server:
        prepared = prepare(make_client(server.url, connect_timeout=0.25, read_timeout=0.25))
        threading.Event().wait(0.6)
        prepared.send()

        assert prepared.answer() == Reply(0)


def test_a_connection_that_is_closed_while_it_waits_for_the_slot_is_broken() -> None:
    # Whether the request has arrived nobody knows: it counts as sent.
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)
        prepared = prepare(make_client(f"http://127.0.0.1:{server.getsockname()[1]}"))
        connection, _ = server.accept()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        threading.Event().wait(0.05)
        prepared.send()

        assert prepared.answer() == NoReply(Failure.BROKEN, sent=True)


def test_a_certificate_that_nobody_trusts_is_unreachable_and_nothing_is_sent(tls: socket.socket) -> None:
    client = make_client(f"https://127.0.0.1:{tls.getsockname()[1]}")

    assert call(client) == NoReply(Failure.UNREACHABLE, sent=False)


def test_proxies_of_the_environment_are_ignored(
    simulated: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")

    assert call(make_client(simulated.url)) == Reply(0)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"ActionStatus": "OK", "ErrorCode": 0, "ErrorInfo": None, "RequestId": None}, Reply(0)),
        ({"ActionStatus": "FAIL", "ErrorCode": 91000, "RequestId": "r1"}, Reply(91000, request_id="r1")),
        (
            {"ActionStatus": "OK", "ErrorCode": 0, "ErrorList": [{"To_Account": "ann", "ErrorCode": "7"}]},
            Reply(0, errors={"ann": UserError(UNNUMBERED, "")}),
        ),
        (
            {
                "ActionStatus": "OK",
                "ErrorCode": 0,
                "ErrorList": [
                    None,
                    {"To_Account": "ann", "ErrorCode": 90035, "ErrorInfo": ""},
                    {"To_Account": ["bob"], "ErrorCode": 90035},
                    {"To_Account": "eve", "ErrorCode": 70107},
                ],
            },
            Reply(0, errors={"ann": UserError(90035, ""), "eve": UserError(70107, "")}),
        ),
        (
            {"ActionStatus": "FAIL", "ErrorCode": 7, "ErrorList": [{"To_Account": "ann", "ErrorCode": 8}]},
            Reply(7, errors={"ann": UserError(8, "")}),
        ),
    ],
    ids=["null texts", "request id of a failure", "code is text", "good and malformed entries", "both fail"],
)
def test_odd_answers_are_read_completely(body: object, expected: Reply) -> None:
    assert read_reply(json.dumps(body).encode()) == expected


def test_an_error_list_comes_through_over_http(simulated: Simulation) -> None:
    client = make_client(simulated.url)
    simulated.fail(Fault("user_code", user="ann", code=70107))
    simulated.api.quirks.bad_user = "list"

    try:
        assert call(client) == Reply(0, errors={"ann": UserError(70107, "")})
    finally:
        simulated.api.quirks.bad_user = "batch"


@pytest.mark.parametrize("applied", [False, True])
def test_a_reset_does_not_tell_whether_the_values_were_applied(applied: bool, simulated: Simulation) -> None:
    simulated.api.users.clear()
    simulated.fail(Fault("reset", applied=applied))

    assert call(make_client(simulated.url)) == NoReply(Failure.BROKEN, sent=True)

    assert ("ann" in simulated.api.users) is applied


def saying_and_closing(data: bytes) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.sendall(data)
        connection.close()

    return answer


CHUNKED = (
    b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n23\r\n{"ActionStatus":"OK","ErrorCode":0}\r\n'
)


@pytest.mark.parametrize(
    ("data", "expected"),
    [(CHUNKED + b"0\r\n\r\n", Reply(0)), (CHUNKED, NoReply(Failure.BROKEN))],
    ids=["whole", "without its end"],
)
def test_a_chunked_answer_needs_its_end(data: bytes, expected: Answer) -> None:
    with wire(saying_and_closing(data)) as server:
        assert call(make_client(server.url)) == expected


def test_a_connection_closed_between_two_calls_is_opened_again() -> None:
    closed = threading.Event()

    def answer_and_close(connection: socket.socket) -> None:
        connection.sendall(OK)
        connection.close()
        closed.set()

    with wire(answer_and_close) as server:
        client = make_client(server.url)
        call(client)
        assert closed.wait(5)

        assert call(client) == Reply(0)
        assert server.connections == 2


def test_a_host_that_does_not_let_us_in_is_unreachable() -> None:
    with contextlib.ExitStack() as stack:
        # Linux drops further attempts once the queue of those not yet accepted is full.
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(server.getsockname())
        client = make_client(f"http://127.0.0.1:{server.getsockname()[1]}", connect_timeout=0.3)

        assert call(client) == NoReply(Failure.UNREACHABLE, sent=False)


def test_an_unknown_host_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)

    assert call(make_client("http://host.invalid")) == NoReply(Failure.UNREACHABLE, sent=False)


def test_an_answer_may_take_longer_than_connecting() -> None:
    def answer(connection: socket.socket) -> None:
        threading.Event().wait(0.3)
        connection.sendall(OK)

    with wire(answer) as server:
        assert call(make_client(server.url, connect_timeout=0.1, read_timeout=5)) == Reply(0)


def test_a_head_that_drips_is_left_at_the_deadline() -> None:
    dripped_to_the_end = threading.Event()

    def drip_head(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        for _ in range(20):
            threading.Event().wait(0.05)
            connection.sendall(b"x")
        dripped_to_the_end.set()

    with wire(drip_head) as server:
        client = make_client(server.url, connect_timeout=0.1, read_timeout=0.3)

        assert call(client) == NoReply(Failure.TIMEOUT)

    assert not dripped_to_the_end.is_set()


# Secrets, with the logs as the product sets them up.


@contextlib.contextmanager
def product_logs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No fixture: one would hold the standard output of the set-up, which capsys does not see."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    names = ("celery", "kombu", "amqp", "urllib3", "celery.worker.strategy", "celery.app.trace")
    levels = {name: logging.getLogger(name).level for name in names}
    logs.configure("debug", "json")
    # Setting up the logs has put away the handler that captures them.
    root.addHandler(caplog.handler)
    try:
        yield
    finally:
        root.handlers[:], root.level = handlers, level
        for name, before in levels.items():
            logging.getLogger(name).setLevel(before)
        structlog.reset_defaults()


def signed_client(url: str) -> tuple[ChatApi, str]:
    """A client, and the one UserSig that it uses."""
    now = time.time()
    signer = Signer(lambda: SECRET_KEY, "administrator", APP, now=lambda: now)
    client = ChatApi(
        url, signer, sdkappid=APP, identifier="administrator", connect_timeout=0.3, read_timeout=0.3
    )
    return client, signer.current().text


@dataclass
class Watch:
    """Calls as the product makes them, and looks at all that comes out."""

    caplog: pytest.LogCaptureFixture
    capsys: pytest.CaptureFixture[str]

    def call(self, url: str) -> Answer:
        client, sig = signed_client(url)
        with product_logs(self.caplog):
            result = call(client)
        self.check(sig, repr(result))
        return result

    def check(self, sig: str, shown: str) -> None:
        text = shown + self.caplog.text + "".join(self.capsys.readouterr())
        assert SECRET_KEY not in text
        assert sig not in text
        assert quote_plus(sig) not in text
        assert "usersig" not in text.lower()


@pytest.fixture
def watch(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> Watch:
    return Watch(caplog, capsys)


def test_the_watch_sees_debug_lines_and_a_leak(watch: Watch) -> None:
    with product_logs(watch.caplog):
        logging.getLogger("somebody").debug("a line")

    assert "a line" in watch.caplog.text
    assert "a line" in watch.capsys.readouterr().out
    with pytest.raises(AssertionError):
        watch.check("the signature", "shows the signature")


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", code=502),
        Fault("reset"),
        Fault("reset", applied=True),
        Fault("truncated"),
        Fault("slow", delay=0.5),
        Fault("code", code=70009),
    ],
    ids=lambda fault: f"{fault.kind} {fault.code} {fault.applied}",
)
def test_a_simulated_failure_shows_no_secret(fault: Fault, simulated: Simulation, watch: Watch) -> None:
    simulated.fail(fault)

    assert watch.call(simulated.url) != Reply(0)


@pytest.mark.parametrize(
    "answer",
    [
        saying(http(b"", "302 Found", extra="Location: /elsewhere\r\n")),
        saying(http(b'{"Erro', length=60)),
        saying_and_closing(http(b'{"Erro', length=60)),
        lambda connection: connection.close(),
        drip,
        saying(b"not http at all\r\n\r\n"),
        saying(http(b" " * 1_000_100)),
        saying(CHUNKED + b"no number\r\n"),
    ],
    ids=["redirect", "stalls", "cut short", "closed", "drips", "no http", "endless", "bad chunk"],
)
def test_a_failure_on_the_wire_shows_no_secret(answer: Callable[[socket.socket], None], watch: Watch) -> None:
    with wire(answer) as server:
        assert isinstance(watch.call(server.url), NoReply)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_refused_connection_shows_no_secret(scheme: str, watch: Watch) -> None:
    assert isinstance(watch.call(f"{scheme}://127.0.0.1:{free_port()}"), NoReply)


@pytest.mark.parametrize(
    "data",
    [
        http(b"", "302 Found", extra="Location: http://[\r\n"),
        http(b"", "302 Found", extra="Location: http://\xff\xfe/\r\n"),
        http(b"", "302 Found", extra="Location: http://127.0.0.1:1/\r\n" * 90),
        b"HTTP/1.1 200 OK\r\nContent-Length: \xc2\xb2\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n",
        b"HTTP/1.1 999999999999999999999 OK\r\n\r\n",
        b"HTTP/9.9 200 OK\r\n\r\n{}",
        b"\xff" * 200,
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        http(b"\x1f\x8b" + b"\0" * 1000, extra="Content-Encoding: gzip\r\n"),
        http(b"x" * 2_000_000, "302 Found", extra="Location: /\r\nContent-Encoding: gzip\r\n"),
        http(b"x" * 2_000_000, "500 Internal Server Error"),
        http(b"{}", "429 Too Many Requests", extra="Retry-After: \xc2\xb2\r\n"),
        http(b"{}", "429 Too Many Requests", extra="Retry-After: Mon, 99 Foo 9999 99:99:99 GMT\r\n"),
        http(b"{}", "503 Service Unavailable", extra="Retry-After: Fri, 31 Dec 9999 23:59:59 -2359\r\n"),
    ],
)
def test_whatever_is_answered_becomes_a_value(data: bytes) -> None:
    with wire(saying_and_closing(data)) as server:
        assert isinstance(call(make_client(server.url)), NoReply | Reply)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("", 0.0),
        ("Retry-After: 7\r\n", 7.0),
        ("Date: Wed, 25 Nov 2026 10:00:00 GMT\r\nRetry-After: Wed, 25 Nov 2026 10:00:30 GMT\r\n", 30.0),
        ("Date: Wed, 25 Nov 2026 10:00:00 GMT\r\nRetry-After: Wed, 25 Nov 2026 09:00:00 GMT\r\n", 0.0),
        ("Retry-After: soon\r\n", 0.0),
        ("Retry-After: -1\r\n", 0.0),
    ],
)
def test_too_many_requests_is_a_rate_code(header: str, seconds: float) -> None:
    with wire(saying(http(b"<html>", "429 Too Many Requests", extra=header))) as server:
        answer = call(make_client(server.url))

    assert isinstance(answer, Reply)
    assert (answer.code, answer.retry_after) == (429, seconds)


@pytest.mark.parametrize(
    "code", ["9" * 400, "-" + "9" * 400, "1e400", "2147483648", '"7"', "null", "true", "[1]"]
)
def test_a_code_that_is_none_is_unnumbered(code: str) -> None:
    body = f'{{"ActionStatus":"OK","ErrorCode":0,"ErrorList":[{{"To_Account":"ann","ErrorCode":{code}}}]}}'

    answer = read_reply(body.encode())

    assert isinstance(answer, Reply)
    assert answer.errors["ann"].code == UNNUMBERED


def test_words_are_cut_and_can_be_stored() -> None:
    answer = read_reply(json.dumps({"ErrorCode": 5, "ErrorInfo": "\ud800" + "x" * 5000}).encode())

    assert isinstance(answer, Reply)
    assert len(answer.info.encode()) <= 1000
