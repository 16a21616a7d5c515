"""URLs of Redis: one reading, for every client of this project and for Celery's.

::

    redis://[user:password@]host[:port][/database]                        one server, or a name that follows the primary
    redis+sentinel://[user:password@]host:port,host:port/SERVICE[/database]     whatever primary the sentinels name
    redis+cluster://[user:password@]host:port,host:port                   the node that has the app's slot
    unix://[user:password@]/path/of/the.sock[?db=1]

With TLS: `rediss`, `rediss+sentinel`, `rediss+cluster`; the options `ssl_ca_certs`, `ssl_certfile`, `ssl_keyfile`,
`ssl_cert_reqs` and `ssl_check_hostname` are those of the redis library. Certificates are verified unless an option says
otherwise. The sentinels' own account is `sentinel_username` and `sentinel_password`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from urllib.parse import parse_qsl, unquote

Kind = Literal["server", "sentinel", "cluster", "socket"]

SCHEMES = {
    "redis": "server",
    "rediss": "server",
    "redis+sentinel": "sentinel",
    "rediss+sentinel": "sentinel",
    "redis+cluster": "cluster",
    "rediss+cluster": "cluster",
    "unix": "socket",
    "redis+socket": "socket",
}

#: The default ports of a server and of a sentinel.
PORT, SENTINEL_PORT = 6379, 26379

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """Where a Redis is, and how to reach it. Its text shows neither user nor password."""

    kind: Kind
    #: The server, the sentinels, or some nodes of the cluster; empty for a socket.
    hosts: tuple[tuple[str, int], ...] = ()
    #: Path of a Unix socket.
    path: str = ""
    #: Name by which the sentinels know the primary.
    service: str = ""
    database: int = 0
    username: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    sentinel_username: str = field(default="", repr=False)
    sentinel_password: str = field(default="", repr=False)
    #: A file that holds the password instead, read again for every connection.
    password_file: str = ""
    tls: bool = False
    #: `ssl_...` of the redis library.
    tls_options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """The place alone, for people."""
        if self.kind == "socket":
            return f"{self.path}, database {self.database}"
        places = ", ".join(
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts
        )
        if self.kind == "sentinel":
            return f"{self.service} of the sentinels {places}, database {self.database}"
        return f"the cluster of {places}" if self.kind == "cluster" else f"{places}, database {self.database}"


def read_redis_url(url: str) -> RedisUrl:
    """Read a URL; raises `ValueError` with the rule that it breaks, and nothing of its content."""
    scheme, separator, rest = url.strip().partition("://")
    kind: Any = SCHEMES.get(scheme.lower())
    if not separator or kind is None:
        raise ValueError(f"must be a URL that starts with {', '.join(f'{name}://' for name in SCHEMES)}")
    if kind != "socket" and "@" in rest and "@" not in re.split(r"[/?#]", rest, maxsplit=1)[0]:
        raise ValueError("has a password with /, ? or # in it: write them as %2F, %3F and %23")
    rest, _, query = rest.partition("?")
    if "#" in rest or "#" in query:
        raise ValueError("has a # in it: write it as %23")
    account, _, place = rest.rpartition("@")
    username, _, password = account.partition(":")
    options = _options(query, tls=scheme.startswith("rediss"), kind=kind)
    found: dict[str, Any] = {
        "kind": kind,
        "username": unquote(username),
        "password": unquote(password),
        **options,
    }
    if kind == "socket":
        if not place.startswith("/"):
            raise ValueError("must have the absolute path of a socket, as in unix:///run/redis.sock")
        return RedisUrl(path=unquote(place), **found)
    hosts, _, path = place.partition("/")
    parts = path.strip("/").split("/") if path.strip("/") else []
    if kind == "sentinel":
        if not parts:
            raise ValueError(
                "must end with the name of the service, as in redis+sentinel://host:26379/mymaster"
            )
        found["service"] = unquote(parts.pop(0))
    if parts:
        found["database"] = _database(parts.pop(0))
    if parts:
        raise ValueError("has more in its path than a database")
    if kind == "cluster" and found.get("database"):
        raise ValueError("names a database: a cluster has only database 0")
    found["hosts"] = _hosts(hosts, SENTINEL_PORT if kind == "sentinel" else PORT, many=kind != "server")
    return RedisUrl(tls=scheme.startswith("rediss"), **found)


def with_password_file(url: str | RedisUrl, path: str) -> RedisUrl:
    """The same place, with the password in a file, which is read for every connection: a new password needs no restart.

    Raises `ValueError` for a URL that cannot be read, or that has a password itself.
    """
    place = read_redis_url(url) if isinstance(url, str) else url
    if place.password:
        raise ValueError("has a password, and there is a file with a password, too: choose one")
    return replace(place, password_file=path)


def _hosts(text: str, port: int, *, many: bool) -> tuple[tuple[str, int], ...]:
    hosts = text.split(",")
    if len(hosts) > 1 and not many:
        raise ValueError("names several servers: use redis+sentinel:// or redis+cluster://")
    return tuple(_host(host, port) for host in hosts)


def _host(text: str, port: int) -> tuple[str, int]:
    bracketed = re.fullmatch(r"\[([0-9A-Fa-f:.]+(?:%\w+)?)\](?::(\d{1,5}))?", text)
    plain = re.fullmatch(r"([^\[\]:\s/]+)(?::(\d{1,5}))?", text)
    match = bracketed or plain
    if not match or (plain and not all(match[1].rstrip(".").split("."))):
        raise ValueError("must name each server as host or host:port")
    found = int(match[2]) if match[2] else port
    if not 1 <= found <= 65_535:
        raise ValueError("has a port that is not from 1 to 65535")
    return match[1], found


def _database(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 6):
        raise ValueError("must name its database by a number")
    return int(text)


def _flag(value: str) -> bool:
    if value.lower() in _TRUE + _FALSE:
        return value.lower() in _TRUE
    raise ValueError("must be true or false")


def _verification(value: str) -> str:
    # The redis library says none, Celery CERT_NONE.
    level = value.lower().removeprefix("cert_")
    if level not in ("none", "optional", "required"):
        raise ValueError("must be none, optional or required")
    return level


#: The options that a URL may have, with what reads each value.
_OPTIONS: dict[str, Callable[[str], Any]] = {
    "ssl_ca_certs": str,
    "ssl_certfile": str,
    "ssl_keyfile": str,
    "ssl_cert_reqs": _verification,
    "ssl_check_hostname": _flag,
    "sentinel_username": str,
    "sentinel_password": str,
    "db": _database,
    # Every connection here speaks RESP2.
    "protocol": str,
}


def _options(query: str, *, tls: bool, kind: Kind) -> dict[str, Any]:
    found: dict[str, Any] = {}
    tls_options: dict[str, Any] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in _OPTIONS:
            # An unknown name may be part of a password.
            known = ", ".join(_OPTIONS)
            raise ValueError(f"has an option ({len(name)} characters) that is none of {known}")
        try:
            read = _OPTIONS[name](value)
        except ValueError as mistake:
            raise ValueError(f"has an option {name} that {mistake}") from None
        if name.startswith("ssl_"):
            tls_options[name] = read
        elif name == "db":
            found["database"] = read
        elif name != "protocol":
            found[name] = read
    if tls_options and not tls:
        raise ValueError("has options for TLS without TLS: begin it with rediss")
    if kind != "sentinel" and any(name.startswith("sentinel_") for name in found):
        raise ValueError("has an account for sentinels but names none: begin it with redis+sentinel")
    if tls:
        found["tls_options"] = _tls(tls_options)
    return found


def _tls(given: Mapping[str, Any]) -> dict[str, Any]:
    if bool(given.get("ssl_certfile")) != bool(given.get("ssl_keyfile")):
        raise ValueError("must have both ssl_certfile and ssl_keyfile, or neither")
    reqs = given.get("ssl_cert_reqs", "required")
    # Without verification there is no name to check.
    return {"ssl_check_hostname": reqs == "required", **given, "ssl_cert_reqs": reqs}
