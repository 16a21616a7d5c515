"""Messages as Celery clients write them, and as nobody should: for the tests of the queue, and for the chaos run."""

from __future__ import annotations

import base64
import json
import random
import uuid
from typing import Any

EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


def envelope(
    user: Any = "ann",
    attrs: Any = None,
    *,
    task: Any = "attributes.update",
    args: Any = None,
    kwargs: Any = None,
    **headers: Any,
) -> dict[str, Any]:
    """A message of protocol 2 as kombu keeps it in Redis. Headers named here replace the usual ones."""
    given = [user, attrs or {"city": "Paris"}] if args is None else args
    id = str(uuid.uuid4())
    return sealed(
        [given, {} if kwargs is None else kwargs, EMBED],
        {"lang": "py", "task": task, "id": id, "eta": None, "expires": None, "timelimit": [None, None]}
        | headers,
    )


def sealed(body: Any, headers: Any, *, packed: bytes | None = None) -> dict[str, Any]:
    """An envelope around any body: text as JSON, or `packed` as it is."""
    raw = json.dumps(body).encode() if packed is None else packed
    return {
        "body": base64.b64encode(raw).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": headers,
        "properties": {
            "correlation_id": str(uuid.uuid4()),
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": "updates"},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": str(uuid.uuid4()),
        },
    }


def encoded(message: Any) -> bytes:
    return json.dumps(message).encode()


#: What no client should send, each with a word for it.
MALFORMED: dict[str, Any] = {
    "not JSON": b"hello",
    "no text at all": b"\xff\xfe\x00",
    "nothing": b"",
    "null": None,
    "a number": 7,
    "a list": [],
    "an empty object": {},
    "no properties": {"body": "e30=", "headers": {}},
    "no headers": sealed([["ann", {"city": "x"}], {}, {}], None),
    "headers that are a list": sealed([["ann", {"city": "x"}], {}, {}], ["task"]),
    "a body that is text": sealed("hello", {"task": "attributes.update", "id": "1"}),
    "a body that is null": sealed(None, {"task": "attributes.update", "id": "1"}),
    "a body of [args]": sealed([["ann"]], {"task": "attributes.update", "id": "1"}),
    "a body that is not base64": envelope() | {"body": "\u00fc"},
    "a body that is a number": envelope() | {"body": 7},
    "a body that is not JSON": sealed(None, {"task": "attributes.update", "id": "1"}, packed=b"{"),
    "a body that is too deep": sealed(
        None, {"task": "attributes.update", "id": "1"}, packed=b"[" * 100_000 + b"]" * 100_000
    ),
    "an unknown type": sealed(
        [["ann", {"city": {"__type__": "x", "__value__": 1}}], {}, {}],
        {"task": "attributes.update", "id": "1"},
    ),
    "a type with a bad value": sealed(
        [["ann", {"city": {"__type__": "uuid", "__value__": 1}}], {}, {}],
        {"task": "attributes.update", "id": "1"},
    ),
    "args that are an object": envelope(args={"a": 1}),
    "args that are text": envelope(args="ann"),
    "kwargs that are a list": envelope(kwargs=["x"]),
    "an unknown argument": envelope(kwargs={"colour": "red"}),
    "an argument given twice": envelope(kwargs={"user_id": "bob"}),
    "too many arguments": envelope(args=["ann", {"city": "x"}, None, 1]),
    "no task": sealed([["ann", {"city": "x"}], {}, {}], {"id": "1"}),
    "a task that is an object": envelope(task={}),
    "an unknown task": envelope(task="attributes.updat"),
    "an eta that is no time": envelope(eta="tomorrow"),
    "an eta that is a number": envelope(eta=1e30),
    "an expiry that is no time": envelope(expires="soon"),
    "an expiry that is an object": envelope(expires={"a": 1}),
    "pickle": envelope() | {"content-type": "application/x-python-serialize"},
    "no content type": envelope() | {"content-type": None},
    "an unknown compression": envelope(compression="application/x-unknown"),
    "a compression that is a list": envelope(compression=["gzip"]),
    "gzip that is not": envelope(compression="application/x-gzip"),
    "an unknown encoding": envelope() | {"content-encoding": "klingon"},
    "an encoding that is an object": envelope() | {"content-encoding": {}},
    "an encoding that is slow": envelope() | {"content-encoding": "idna"},
    "updates that are text": envelope(task="attributes.update_many", args=["ann"]),
    "a user that is a list": envelope(user=["ann"]),
    "attributes that are a number": envelope(attrs=7),
}


def mutated(dice: random.Random, message: Any) -> bytes:
    """A valid message with some things in it changed: values, names, whole parts, or bytes of it."""
    found = json.loads(json.dumps(message))
    for _ in range(dice.choice([1, 1, 1, 2, 5])):
        found = _changed(dice, found)
    raw = encoded(found)
    if dice.random() < 0.3:
        place = dice.randrange(len(raw) + 1)
        raw = dice.choice(
            [
                raw[:place],
                raw[:place] + bytes([dice.randrange(256)]) + raw[place + 1 :],
                raw[place:],
                raw + raw,
            ]
        )
    return raw


def _changed(dice: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value and dice.random() < 0.85:
        name = dice.choice(sorted(value, key=str))
        if name == "body" and isinstance(value[name], str) and dice.random() < 0.7:
            try:
                inner = json.loads(base64.b64decode(value[name]))
            except ValueError:
                return value | {name: _odd(dice)}
            return value | {name: base64.b64encode(encoded(_changed(dice, inner))).decode()}
        if dice.random() < 0.15:
            return {other: kept for other, kept in value.items() if other != name}
        if dice.random() < 0.1:
            return value | {dice.choice(["task", "eta", "__type__", "\ud800", "compression"]): _odd(dice)}
        return value | {name: _changed(dice, value[name])}
    if isinstance(value, list) and value and dice.random() < 0.85:
        place = dice.randrange(len(value))
        if dice.random() < 0.15:
            return value[:place] + value[place + 1 :]
        return [*value[:place], _changed(dice, value[place]), *value[place + 1 :]]
    return _odd(dice)


def _odd(dice: random.Random) -> Any:
    deep: Any = "x"
    for _ in range(dice.choice([3, 200])):
        deep = [deep]
    return dice.choice(
        [
            None,
            True,
            0,
            -1,
            10**400,
            1e308,
            float("nan"),
            float("inf"),
            "",
            "x",
            "\ud800",
            "\x00\x1b[2J",
            "9999-12-31T23:59:59.999999+00:00",
            "0001-01-01",
            "2026-11-25T12:00:00",
            "x" * 5000,
            [],
            {},
            deep,
            {"__type__": "datetime", "__value__": "2026-11-25T12:00:00"},
            {"__type__": "uuid", "__value__": {"hex": "0" * 32}},
            {"__type__": "decimal", "__value__": "1e999999"},
            {"__type__": "bytes", "__value__": "x"},
            {"__type__": ["x"], "__value__": None},
        ]
    )
