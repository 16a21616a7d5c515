"""What nobody should send, for every border but the queue's, which has `tests/intake/messages.py`."""

from __future__ import annotations

import contextlib
import json
import random
import socket
from collections.abc import Iterable, Iterator

#: Fields of stream entries that are refused.
ENTRIES: tuple[dict[bytes | str, bytes | str], ...] = (
    {"user": "rubbish"},
    {"attrs": '{"city":"x"}'},
    {"something": "else"},
    {"user": "", "attrs": '{"city":"x"}'},
    {"user": b"\xff\xfe", "attrs": b"\xff"},
    {"user": "rubbish", "attrs": "no JSON"},
    {"user": "rubbish", "attrs": "[" * 100_000},
    {"user": "rubbish", "attrs": '{"city":1e999}'},
    {"user": "rubbish", "attrs": '{"city":["x"]}'},
    {"user": "rubbish", "attrs": '{"city":"\\ud800"}'},
    {"user": "rubbish", "attrs": "{}"},
    {"user": "rubbish", "attrs": json.dumps({"city": "x" * 51})},
    {"user": "rubbish", "attrs": '{"no such name":"x"}'},
    {"user": "rubbish", "attrs": '{"city":"x"}', "occurred_at": "tomorrow"},
    {"user": "rubbish", "attrs": '{"city":"x"}', "occurred_at": "1e999"},
    {"user": "rubbish", "attrs": '{"city":"x"}', "occurred_at": "-7"},
    {b"\x00": b"\x00"},
)

#: Lines of a file that are refused.
LINES = (
    "",
    "no JSON",
    "{",
    "[]",
    "null",
    '{"user":"rubbish"}',
    '{"user":["rubbish"],"attrs":{"city":"x"}}',
    '{"user":"rubbish","attrs":{"city":7e400}}',
    '{"user":"rubbish","attrs":{"city":"\\ud800"}}',
    '{"user":"rubbish","attrs":"city"}',
    "[" * 50_000,
)


def requests_of(dice: random.Random, port: int) -> Iterator[bytes]:
    """Requests that are none, or that ask for what nobody may have."""
    host = f"Host: 127.0.0.1:{port}\r\n"
    yield dice.randbytes(2000)
    yield b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + dice.randbytes(200)
    yield b"*1\r\n$4\r\nPING\r\n"
    yield b"GET / HTTP/1.1\r\n"
    yield f"GET /{'a' * 70_000} HTTP/1.1\r\n{host}\r\n".encode()
    yield f"GET / HTTP/1.1\r\n{host}{'X: y' * 20_000}\r\n\r\n".encode()
    yield f"GET /../../etc/passwd HTTP/1.1\r\n{host}\r\n".encode()
    yield f"GET /\x00%00%ff HTTP/9.9\r\n{host}\r\n".encode("latin-1")
    yield f"POST /dead/purge HTTP/1.1\r\n{host}Content-Length: -5\r\n\r\n".encode()
    yield f"POST /dead/purge HTTP/1.1\r\n{host}Content-Length: 99999999999\r\n\r\nuntil=".encode()
    yield f"POST /line/pause HTTP/1.1\r\n{host}Transfer-Encoding: chunked\r\n\r\nzz\r\n".encode()
    form = b"until=1&count=99999999&token=" + dice.randbytes(20).hex().encode()
    head = f"POST /dead/purge HTTP/1.1\r\n{host}Content-Type: application/x-www-form-urlencoded\r\n"
    yield f"{head}Content-Length: {len(form)}\r\nConnection: close\r\n\r\n".encode() + form
    yield f"GET /metrics HTTP/1.1\r\n{host}Authorization: Bearer {'x' * 5000}\r\nAccept: \xff\r\n\r\n".encode(
        "latin-1"
    )
    yield f"GET /login HTTP/1.1\r\n{host}Cookie: session=\xff\x00; flash=..;.\r\n\r\n".encode("latin-1")


def send_to(ports: Iterable[int], dice: random.Random) -> int:
    """Send all of them to a server of HTTP on this machine, waiting for no answer; returns how many were sent."""
    sent = 0
    for port in ports:
        for request in requests_of(dice, port):
            # It may close the connection while we are still sending.
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 2) as connection:
                connection.settimeout(0.2)
                sent += 1
                connection.sendall(request)
                connection.recv(65_536)
    return sent
