"""The HTTP edge, over real sockets: one call, every reading of its answer, and nothing that leaks."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conftest import SECRET_KEY
from tests.simulation import APP, Simulation, simulation
from worker.client import UNNUMBERED, Client, Failure, NoReply, Reply, UserError, read_reply
from worker.embedded import free_port
from worker.models import Attributes
from worker.simulator import Fault
from worker.usersig import Signer, decode

USERS: list[tuple[str, Attributes]] = [("ann", {"city": "深圳"}), ("bob", {"level": "Gold"})]


@pytest.fixture(scope="module")
def simulated() -> Iterator[Simulation]:
    with simulation() as running:
        yield running


@pytest.fixture(autouse=True)
def no_faults(simulated: Simulation) -> None:
    simulated.fail()


def make_client(url: str, **options: Any) -> Client:
    signer = Signer(SECRET_KEY, "administrator", APP)
    defaults = {"connect_timeout": 1.0, "read_timeout": 1.0}
    return Client(url, signer, sdkappid=APP, identifier="administrator", **defaults | options)


def open_gate() -> None:
    """Let the call through at once."""


def call(client: Client) -> Reply | NoReply:
    return client.send(client.encode(USERS), open_gate)


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


def test_at_the_gate_the_connection_stands_and_nothing_is_sent() -> None:
    with wire(saying(OK)) as server:
        client = make_client(server.url)
        seen: list[tuple[int, int]] = []

        def gate() -> None:
            # The accepting thread may need a moment; the connection stands before that.
            threading.Event().wait(0.05)
            seen.append((server.connections, len(server.requests)))

        client.send(client.encode(USERS), gate)
        client.send(client.encode(USERS), gate)

    assert seen == [(1, 0), (1, 1)]


def test_what_the_gate_raises_passes_through_and_the_client_lives_on(simulated: Simulation) -> None:
    client = make_client(simulated.url)
    before = simulated.api.counts.requests

    def closed() -> None:
        raise LookupError("no slot")

    with pytest.raises(LookupError, match="no slot"):
        client.send(client.encode(USERS), closed)
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
def test_an_answer_is_read_completely(body: object, expected: Reply | NoReply) -> None:
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
def test_a_failure_becomes_a_value(fault: Fault, expected: Reply | NoReply, simulated: Simulation) -> None:
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


def test_a_refused_signature_is_made_anew(simulated: Simulation) -> None:
    moments = iter([1_700_000_000, 1_900_000_000])
    signer = Signer(SECRET_KEY, "administrator", APP, now=lambda: next(moments))
    client = Client(simulated.url, signer, sdkappid=APP, identifier="administrator")

    assert call(client) == Reply(70001, "UserSig has expired")
    client.sign_again()
    assert call(client) == Reply(0)


def test_no_failure_shows_a_secret(
    simulated: Simulation, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    # As the product runs: urllib3 alone would write the URL.
    quiet = logging.getLogger("urllib3")
    quiet.setLevel(logging.ERROR)
    usersig = Signer(SECRET_KEY, "administrator", APP).usersig()
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
