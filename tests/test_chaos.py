"""A short seeded run of everything that can break, and its own tools: the proxy, and the writers' notes."""

from __future__ import annotations

import json
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest

from tests.chaos import upgrades, writers
from tests.chaos.__main__ import run
from tests.chaos.faults import COMMON, FLEET, GROUPS, LINKS, SINGLE, faults_of
from tests.chaos.proxy import Proxy
from tests.history import Answer
from worker.sandbox.redis_server import free_port


@pytest.mark.slow  # 45 s of faults under real processes, and what must be delivered afterwards
@pytest.mark.timeout(240)
def test_nothing_is_lost_or_stale_or_over_the_quota_whatever_breaks(tmp_path: Path) -> None:
    assert run(
        tmp_path, seed=7, seconds=45, workers=2, fsync="always", rabbitmq=False, only=faults_of("single")
    )


@pytest.mark.slow  # what happens to a fleet of servers; one replica of two may be the one that is not promoted
@pytest.mark.timeout(300)
def test_promotions_lose_and_overwrite_nothing_that_replicas_have(tmp_path: Path) -> None:
    assert run(
        tmp_path,
        seed=7,
        seconds=45,
        workers=2,
        fsync="everysec",
        rabbitmq=False,
        only=FLEET,
        store="sentinel",
        replicas=2,
    )


@pytest.mark.slow  # real workers of two versions, started and stopped one after the other
@pytest.mark.timeout(240)
def test_an_upgrade_and_a_downgrade_lose_and_overwrite_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upgrades, "EACH", 1.5)
    monkeypatch.setattr(upgrades, "BETWEEN", 2.0)

    good = upgrades.run(tmp_path, seed=18, workers=2)

    if good is None:
        pytest.skip("the version before is not in this repository's history")
    assert good


def test_every_fault_says_what_it_does_and_stands_in_the_schedule_once() -> None:
    faults = COMMON + SINGLE + FLEET + LINKS
    assert all(fault.__doc__ for fault in faults)
    assert len(set(faults)) == len(faults)
    assert sum(map(len, GROUPS)) == len(set.union(*GROUPS) & set(faults))


@contextmanager
def echoing() -> Iterator[Proxy]:
    """A proxy before a server that sends back what it gets."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def echo(connection: socket.socket) -> None:
            with connection:
                try:
                    while data := connection.recv(65_536):
                        connection.sendall(data)
                except OSError:
                    return

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=echo, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        with Proxy(free_port(), server.getsockname()[1]) as proxy:
            yield proxy


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=10)


def said(connection: socket.socket, text: bytes) -> bytes:
    connection.sendall(text)
    return connection.recv(65_536)


def test_the_proxy_forwards_and_counts_requests() -> None:
    with echoing() as proxy, connect(proxy) as connection:
        assert said(connection, b"POST /one") == b"POST /one"
        assert said(connection, b"the rest of it") == b"the rest of it"
        assert said(connection, b"POST /two") == b"POST /two"

        first, second = proxy.requests()
        assert first <= second


def test_the_proxy_cuts_connections_and_takes_new_ones() -> None:
    with echoing() as proxy, connect(proxy) as connection:
        assert said(connection, b"hello") == b"hello"

        assert proxy.tell("cut") == 1

        with pytest.raises(ConnectionResetError):
            connection.recv(1)
        with connect(proxy) as another:
            assert said(another, b"hello") == b"hello"


def test_the_proxy_refuses_until_told_otherwise() -> None:
    with echoing() as proxy:
        proxy.tell("refuse")
        # The reset may come while it connects, or after.
        with pytest.raises(ConnectionResetError), connect(proxy) as connection:
            connection.recv(1)

        proxy.tell("pass")

        with connect(proxy) as connection:
            assert said(connection, b"hello") == b"hello"


def test_what_the_proxy_swallows_never_comes() -> None:
    with echoing() as proxy, connect(proxy) as connection:
        assert said(connection, b"hello") == b"hello"
        proxy.tell("swallow")
        connection.sendall(b"POST lost")
        # It is counted all the same: it was sent.
        while not proxy.requests():
            pass

        assert proxy.tell("pass") == 1

        with pytest.raises(ConnectionResetError):
            connection.recv(1)


def test_the_notes_of_a_killed_writer_leave_its_last_offer_in_doubt(tmp_path: Path) -> None:
    given = [["u1", {"city": "a", "level": None}, 7]]
    lines = [
        json.dumps({"number": 0, "began": 1.0, "given": given}),
        json.dumps({"number": 0, "ended": 2.0, "answers": ["accepted"]}),
        json.dumps({"number": 1, "began": 3.0, "given": [["u1", {"city": "b"}, 8]]}),
        '{"number": 1, "ended": 4.0, "ans',
    ]
    (tmp_path / "notes").write_text("\n".join(lines))

    first, second, last = writers.read(tmp_path / "notes")

    assert (first.name, first.value, first.began, first.ended, first.answer) == (
        "city",
        "a",
        1.0,
        2.0,
        Answer.ACCEPTED,
    )
    assert (second.name, second.value, second.event_ms) == ("level", None, 7)
    assert (last.value, last.answer, last.ended) == ("b", Answer.DOUBT, float("inf"))


@pytest.mark.parametrize("timed", [False, True])
def test_a_seed_repeats_the_updates_of_a_writer(timed: bool) -> None:
    def some() -> list[tuple[str, dict[str, str | None]]]:
        stream = writers.updates("w", random.Random(3), timed=timed)
        return [(update.user, update.attrs) for update in islice(stream, 500)]

    assert some() == some()
    values = [value for _, attrs in some() for value in attrs.values()]
    assert None in values
    assert len(set(values)) < len(values)
