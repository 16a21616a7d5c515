"""Reads the messages that Celery clients put into the queue of updates.

A client is any program that can write to the broker, so a message may be anything. Whatever it is, `read` either returns
the updates in it or raises `InvalidUpdate` with the reason; it never unpickles, and never decompresses more than
`MOST_BYTES`.

Protocol 2 has the task's name in the headers and ``[args, kwargs, embed]`` in the body; protocol 1 has one object with
everything in the body (Celery documents both on its page "Message Protocol"). Callbacks and chains do not run, because no
task does.
"""

from __future__ import annotations

import binascii
import bz2
import codecs
import json
import lzma
import zlib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

import orjson
from kombu.utils.json import loads as load_with_types

from worker.errors import InvalidUpdate
from worker.models import EARLIEST_MS, LATEST_MS

UPDATE, UPDATE_MANY = "attributes.update", "attributes.update_many"

#: Bytes of the longest message that is read, compressed or not: a good one has a few hundred, one with ten thousand updates
#: about a million. Parsed, JSON can take fifty times its size.
MOST_BYTES = 4_000_000
#: Bytes of memory that decompressing LZMA may take; its header says how many it needs.
_LZMA_MEMORY = 64_000_000

#: The parameters of each task, and how many of them are required.
_PARAMETERS = {UPDATE: (("user_id", "attrs", "occurred_at"), 2), UPDATE_MANY: (("updates",), 1)}

#: Encodings that take quadratic time, or read more than text.
_UNSAFE_ENCODINGS = {"idna", "punycode", "unicode_escape", "raw_unicode_escape"}

_UNPACKERS: dict[str, Callable[[], Any]] = {
    # kombu calls zlib's format gzip; real gzip is read, too.
    **dict.fromkeys(("application/x-gzip", "gzip", "zlib"), lambda: zlib.decompressobj(zlib.MAX_WBITS | 32)),
    **dict.fromkeys(("application/x-bz2", "bzip2", "bzip"), bz2.BZ2Decompressor),
    **dict.fromkeys(
        ("application/x-lzma", "lzma", "xz"), lambda: lzma.LZMADecompressor(memlimit=_LZMA_MEMORY)
    ),
}

_MISSING = object()

_parse_anything = json.JSONDecoder().decode


class Envelope(NamedTuple):
    """A message as the broker hands it out. Nothing in it has been checked."""

    body: bytes
    content_type: Any
    content_encoding: Any
    headers: Any
    properties: Any


class Call(NamedTuple):
    """The content of a message: updates, each ``[user, attributes, event time]`` as the client sent it.

    Times in ms since 1970, 0 if there is none: `eta_ms` before which they must not be accepted, `expires_ms` after which
    they are worthless, `event_ms` for updates without an event time of their own.
    """

    updates: list[Any]
    event_ms: int
    eta_ms: int = 0
    expires_ms: int = 0


def unpack(raw: bytes) -> Envelope:
    """Take apart a message as kombu stores it in Redis: a JSON object with the body in base64."""
    if len(raw) > MOST_BYTES:
        raise _invalid(f"the message is longer than {MOST_BYTES:,} bytes")
    try:
        message = _parse(raw)
    except (ValueError, RecursionError):
        raise _invalid("the message is not JSON") from None
    if type(message) is not dict:
        raise _invalid(f"the message must be an object, got {type(message).__name__}")
    body, properties = message.get("body"), message.get("properties")
    if type(body) is not str:
        raise _invalid(f"the body must be text, got {type(body).__name__}")
    if _object(properties).get("body_encoding") == "base64":
        try:
            packed = binascii.a2b_base64(body)
        except ValueError:
            raise _invalid("the body is not base64") from None
    else:
        packed = body.encode(errors="surrogatepass")
    headers = message.get("headers")
    return Envelope(packed, message.get("content-type"), message.get("content-encoding"), headers, properties)


def read(envelope: Envelope, taken_ms: int) -> Call:
    """Return what a message that was taken from the queue at `taken_ms` asks for; raises `InvalidUpdate`."""
    headers = _object(envelope.headers)
    body = _body(envelope, headers)
    task = headers.get("task")
    if task is None and type(body) is dict:
        # Protocol 1.
        headers = {**headers, **{name: body.get(name) for name in ("task", "eta", "expires")}}
        task, args, kwargs = body.get("task"), body.get("args", []), body.get("kwargs", {})
    elif type(body) is list and len(body) == 3:
        args, kwargs = body[0], body[1]
    else:
        raise _invalid(f"the body must be [args, kwargs, embed], got {_shape(body)}")
    updates = _updates(task, args, kwargs)
    eta, expires = headers.get("eta"), headers.get("expires")
    if eta or expires:
        eta_ms, expires_ms = _moment_ms("eta", eta), _moment_ms("expires", expires)
        if eta_ms > LATEST_MS:
            raise _invalid("the header eta is after the year 2286")
        # It counts as of the time at which it was due, however late it was taken.
        occurred_ms = eta_ms if eta_ms >= EARLIEST_MS else taken_ms
        return Call(updates, occurred_ms, eta_ms, expires_ms)
    return Call(updates, taken_ms)


def legible(envelope: Envelope | bytes) -> str:
    """The beginning of an unusable message, for the person who has to find out what sent it."""
    if isinstance(envelope, Envelope):
        try:
            return _text(envelope, _object(envelope.headers))
        except InvalidUpdate:
            envelope = envelope.body
    return envelope.decode(errors="replace")


def _parse(text: bytes | str) -> Any:
    """Parse JSON as Python's own parser does, three times as fast; raises `ValueError` or `RecursionError`."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        # What only Python's parser accepts, such as NaN, or an error.
        return _parse_anything(text.decode() if isinstance(text, bytes) else text)


def _invalid(rule: str) -> InvalidUpdate:
    return InvalidUpdate("?", rule)


def _object(value: Any) -> dict[str, Any]:
    """The value if it is an object, else an empty one."""
    return value if type(value) is dict else {}


def _shape(value: object) -> str:
    kind = type(value).__name__
    return f"{kind} of {len(value)}" if isinstance(value, list) else kind


def _body(envelope: Envelope, headers: Mapping[str, Any]) -> Any:
    kind = envelope.content_type
    if len(envelope.body) > MOST_BYTES:
        raise _invalid(f"the message is longer than {MOST_BYTES:,} bytes")
    if type(kind) is not str or kind.partition(";")[0].strip().lower() != "application/json":
        shown = f"{kind:.60}" if type(kind) is str else type(kind).__name__
        raise _invalid(f"the content type must be application/json, got {shown!r}")
    text = _text(envelope, headers)
    try:
        # Few messages have types beyond JSON's, such as datetime, and inspecting every object takes time.
        return load_with_types(text) if "__type__" in text else _parse(text)  # type: ignore[no-untyped-call]
    except Exception:
        raise _invalid("the body is not JSON") from None


def _text(envelope: Envelope, headers: Mapping[str, Any]) -> str:
    body, encoding = envelope.body, envelope.content_encoding
    if compression := headers.get("compression"):
        body = decompressed(body, compression)
    if len(body) > MOST_BYTES:
        raise _invalid(f"the body is longer than {MOST_BYTES:,} bytes")
    try:
        if encoding not in ("utf-8", None, "binary", "ascii-8bit"):
            return body.decode(_safe(encoding))
        return body.decode()
    except (ValueError, LookupError):
        raise _invalid("the body is not text in its content encoding") from None


def _safe(encoding: object) -> str:
    if type(encoding) is not str or codecs.lookup(encoding).name in _UNSAFE_ENCODINGS:
        raise LookupError
    return encoding


def decompressed(body: bytes, compression: object) -> bytes:
    """Decompress a body, up to `MOST_BYTES` and one more; raises `InvalidUpdate`."""
    kind = compression if type(compression) is str else ""
    if kind not in _UNPACKERS:
        known = "gzip, bzip2 or lzma"
        raise _invalid(f"the compression must be {known}, got {kind[:60]!r}")
    unpacker = _UNPACKERS[kind]()
    try:
        unpacked: bytes = unpacker.decompress(body, MOST_BYTES + 1)
    except (zlib.error, OSError, EOFError, ValueError, lzma.LZMAError):
        raise _invalid(f"the body is not compressed with {kind}") from None
    if len(unpacked) <= MOST_BYTES and not unpacker.eof:
        raise _invalid("the compressed body is cut short")
    return unpacked


def _updates(task: object, args: Any, kwargs: Any) -> list[Any]:
    if type(task) is not str or task not in _PARAMETERS:
        shown = repr(task[:60]) if type(task) is str else type(task).__name__
        raise _invalid(f"the task must be {UPDATE} or {UPDATE_MANY}, got {shown}")
    if type(args) is not list:
        raise _invalid(f"args must be a list, got {type(args).__name__}")
    if type(kwargs) is not dict:
        raise _invalid(f"kwargs must be an object, got {type(kwargs).__name__}")
    if kwargs:
        args = _merged(task, args, kwargs)
    names, required = _PARAMETERS[task]
    if not required <= len(args) <= len(names):
        raise _invalid(f"the arguments of {task} are ({', '.join(names)})")
    if task == UPDATE:
        return [args]
    if type(args[0]) is not list:
        raise _invalid(f"the updates must be a list, got {type(args[0]).__name__}")
    return args[0]


def _merged(task: str, args: list[Any], kwargs: dict[str, Any]) -> list[Any]:
    """Positional and named arguments as positional ones."""
    names, _ = _PARAMETERS[task]
    given = dict(zip(names, args, strict=False))
    if len(args) > len(names) or given.keys() & kwargs.keys() or kwargs.keys() - set(names):
        raise _invalid(f"the arguments of {task} are ({', '.join(names)})")
    values = [(given | kwargs).get(name, _MISSING) for name in names]
    while values and values[-1] is _MISSING:
        values.pop()
    if _MISSING in values:
        raise _invalid(f"the arguments of {task} are ({', '.join(names)})")
    return values


def _moment_ms(header: str, moment: object) -> int:
    """A time in the headers as ms since 1970, 0 for none. Celery writes ISO 8601, in UTC unless it says otherwise."""
    if not moment:
        return 0
    rule = f"the header {header} must be an ISO 8601 time, got {type(moment).__name__}"
    try:
        found = moment if isinstance(moment, datetime) else datetime.fromisoformat(moment)  # type: ignore[arg-type]
        ms = int((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp() * 1000)
    except (TypeError, ValueError, OverflowError):
        raise _invalid(rule) from None
    return max(ms, 1)
