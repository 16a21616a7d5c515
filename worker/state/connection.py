"""Connections to Redis: the one place that builds a client from a URL.

Everything outside `state/` takes `Redis` and the errors from here, so only this room knows the library.

All keys of an app are on one server: the only one, the primary that sentinels name, or the cluster node that has the app's
slot. So every client here is a plain one. Its connections look that server up whenever they connect, and leave it once it is
no longer the right one.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
import time
from pathlib import Path
from typing import Any, Protocol

from redis import Redis
from redis.asyncio import BlockingConnectionPool
from redis.asyncio import Connection as AsyncConnection
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio import SSLConnection as AsyncSSLConnection
from redis.asyncio import UnixDomainSocketConnection as AsyncSocketConnection
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.connection import (
    AbstractConnection,
    Connection,
    ConnectionPool,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.crc import key_slot
from redis.credentials import CredentialProvider
from redis.exceptions import (
    AskError,
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    ConnectionError,
    DataError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
    TryAgainError,
)
from redis.retry import Retry

from ..redis_url import RedisUrl, read_redis_url
from .scripts import text

__all__ = [
    "AsyncRedis",
    "AuthenticationError",
    "BusyLoadingError",
    "ConnectionError",
    "DataError",
    "NoScriptError",
    "NotPrimary",
    "OutOfMemoryError",
    "Redis",
    "RedisError",
    "ResponseError",
    "TimeoutError",
    "client_options",
    "connect",
    "connect_async",
    "retry_once",
]

#: Seconds that connecting, and one answer, may take before the caller gets an error.
CONNECT_TIMEOUT, ANSWER_TIMEOUT = 3.0, 4.0
#: Seconds that a sentinel, or a node that is asked where a slot is, may take.
LOOKUP_TIMEOUT = 0.5
#: Keeps a connection from describing the client (CLIENT SETINFO): some services refuse that, a user with few rights leaves a
#: refusal in the server's ACL LOG, and it costs two round trips. Newer libraries take the one option, older ones the other.
_SILENT: dict[str, Any] = (
    {"driver_info": None}
    if "driver_info" in inspect.signature(AbstractConnection.__init__).parameters
    else {"lib_name": None, "lib_version": None}
)
#: Seconds after which the sentinels are asked again for the primary: an old one that is cut off from them keeps answering.
LOOK_AGAIN = 1.0


class NotPrimary(ConnectionError):
    """Raised when a server refuses a command because another one is the primary, or soon will be.

    The connection is closed, so the next attempt looks for the primary again.
    """


class Locator(Protocol):
    """Finds the primary."""

    def locate(self) -> tuple[str, int]:
        """Look it up now; raises `ConnectionError` if nobody knows."""

    def current(self) -> tuple[str, int] | None:
        """Where it was last found, looked up again from time to time; None if not known, or if it need not be watched."""


class SentinelLocator:
    """Asks sentinels where the primary is, and believes the one that knows of the latest failover."""

    def __init__(self, url: RedisUrl) -> None:
        options: dict[str, Any] = {
            "username": url.sentinel_username or None,
            "password": url.sentinel_password or None,
            **_lookup_options(url, logs_in=bool(url.sentinel_password)),
        }
        kind = _SSLConnection if url.tls else _Connection
        self._sentinels = [
            Redis(connection_pool=ConnectionPool(kind, host=host, port=port, **options))
            for host, port in url.hosts
        ]
        self._service = url.service
        self._lock = threading.Lock()
        self._found: tuple[str, int] | None = None
        self._look_at = 0.0

    def locate(self) -> tuple[str, int]:
        with self._lock:
            self._found = self._ask()
            self._look_at = time.monotonic() + LOOK_AGAIN
            return self._found

    def _ask(self) -> tuple[str, int]:
        answers: list[tuple[int, tuple[str, int]]] = []
        unreachable: list[Redis] = []
        reason = "none of the sentinels answers"
        for sentinel in list(self._sentinels):
            try:
                state, (host, port) = self._look(sentinel)
            except ResponseError:
                reason = f"the sentinels do not know a service {self._service}"
                continue
            except RedisError:
                unreachable.append(sentinel)
                continue
            watched = (state["ip"], int(state["port"])) == (host, port)
            if watched and (state["is_sdown"] or state["is_odown"]):
                reason = "the sentinels say that the primary is down"
                continue
            answers.append((int(state.get("config-epoch", 0)), (host, port)))
            if 2 * len(answers) > len(self._sentinels):
                break
        # Those that do not answer are asked last next time, since each costs its timeout.
        self._sentinels.sort(key=unreachable.__contains__)
        if not answers:
            raise ConnectionError(reason)
        return max(answers)[1]

    def _look(self, sentinel: Redis) -> tuple[Any, tuple[str, int]]:
        # The sentinel that leads a failover counts it as done, and names the new primary, while it still watches the old one,
        # until the other replicas follow. That may take seconds, and what clients write to the old one is lost.
        with sentinel.pipeline(transaction=False) as pipe:
            pipe.sentinel_master(self._service)
            pipe.sentinel_get_master_addr_by_name(self._service)
            state, (host, port) = pipe.execute()
        return state, (text(host), int(port))

    def current(self) -> tuple[str, int] | None:
        if time.monotonic() < self._look_at or not self._lock.acquire(blocking=False):
            return self._found
        try:
            self._look_at = time.monotonic() + LOOK_AGAIN
            with contextlib.suppress(RedisError):
                self._found = self._ask()
            return self._found
        finally:
            self._lock.release()


class ClusterLocator:
    """Asks the nodes of a cluster which of them has a slot. A node that has lost it says so itself (MOVED)."""

    def __init__(self, url: RedisUrl, key: str, credentials: CredentialProvider | None) -> None:
        """`key` is any key in the slot."""
        self._nodes, self._slot = list(url.hosts), key_slot(key.encode())
        self._kind = _SSLConnection if url.tls else _Connection
        self._options: dict[str, Any] = {
            **_account(url, credentials),
            **_lookup_options(url, logs_in=bool(credentials or url.password)),
        }
        self._lock = threading.Lock()

    def locate(self) -> tuple[str, int]:
        with self._lock:
            for node in list(self._nodes):
                if found := self._ask(*node):
                    return found
        raise ConnectionError("none of the cluster's nodes says who has the app's slot")

    def _ask(self, host: str, port: int) -> tuple[str, int] | None:
        pool = ConnectionPool(self._kind, host=host, port=port, **self._options)
        try:
            with Redis(connection_pool=pool) as node:
                slots: Any = node.execute_command("CLUSTER", "SLOTS")
        except RedisError:
            return None
        finally:
            pool.disconnect()
        found = None
        for first, last, (name, number, *_), *_replicas in slots:
            # A node may leave out its own address.
            primary = (text(name or b"") or host, int(number))
            if first <= self._slot <= last:
                found = primary
            if primary not in self._nodes:
                self._nodes.append(primary)
        if found:
            # Asked first next time; if it has died, those that will know better come next.
            self._nodes.sort(key=lambda node: node != found)
        return found

    def current(self) -> tuple[str, int] | None:
        return None


#: A server's answers when it is no longer the primary, or cannot write. From a script, Redis 6.2 puts them at the end of a
#: longer message.
_LEAVE = (ReadOnlyError, AskError, TryAgainError, ClusterDownError)
_LEAVE_WORDS = ("-READONLY ", "UNBLOCKED ", "NOREPLICAS ")


def _must_leave(error: ResponseError) -> bool:
    return isinstance(error, _LEAVE) or any(words in f"{error} " for words in _LEAVE_WORDS)


class _Following:
    """What our connections add to the library's: they look up where to connect, and leave a server that was demoted."""

    locator: Locator | None
    host: str
    port: int

    def __init__(self, *, locator: Locator | None = None, **options: Any) -> None:
        self.locator = locator
        super().__init__(**options)

    def _has_moved(self) -> bool:
        now = self.locator.current() if self.locator else None
        return now is not None and now != (self.host, self.port)


class _Sync(_Following):
    def _connect(self) -> Any:
        if self.locator:
            self.host, self.port = self.locator.locate()
        return super()._connect()  # type: ignore[misc]

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        if self.is_connected and self._has_moved():  # type: ignore[attr-defined]
            self.disconnect()  # type: ignore[attr-defined]
        super().send_packed_command(command, check_health)  # type: ignore[misc]

    def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return super().read_response(*args, **options)  # type: ignore[misc]
        except ResponseError as error:
            if not _must_leave(error):
                raise
            self.disconnect()  # type: ignore[attr-defined]
            raise NotPrimary(str(error)) from None


class _Async(_Following):
    # A lookup blocks for as long as a sentinel may take, so it runs in a thread.

    async def _connect(self) -> None:
        if self.locator:
            self.host, self.port = await asyncio.to_thread(self.locator.locate)
        await super()._connect()  # type: ignore[misc]

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        if self.locator and self.is_connected and await asyncio.to_thread(self._has_moved):  # type: ignore[attr-defined]
            await self.disconnect(nowait=True)  # type: ignore[attr-defined]
        await super().send_packed_command(command, check_health)  # type: ignore[misc]

    async def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return await super().read_response(*args, **options)  # type: ignore[misc]
        except ResponseError as error:
            if not _must_leave(error):
                raise
            await self.disconnect(nowait=True)  # type: ignore[attr-defined]
            raise NotPrimary(str(error)) from None


class _Connection(_Sync, Connection):
    pass


class _SSLConnection(_Sync, SSLConnection):
    pass


class _SocketConnection(_Sync, UnixDomainSocketConnection):
    pass


class _AsyncConnection(_Async, AsyncConnection):
    pass


class _AsyncSSLConnection(_Async, AsyncSSLConnection):
    pass


class _AsyncSocketConnection(_Async, AsyncSocketConnection):
    pass


class _PasswordFile(CredentialProvider):
    """Reads the password whenever a connection opens, so a new one needs no restart."""

    def __init__(self, path: str, username: str) -> None:
        self._path, self._username = Path(path), username
        self._password = ""

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        # The file may be in the middle of being replaced: then the last password may still work.
        problem = "is empty"
        try:
            self._password = self._path.read_text(encoding="utf-8-sig").rstrip("\r\n") or self._password
        except (OSError, ValueError) as error:
            problem = f"cannot be read ({type(error).__name__})"
        if not self._password:
            raise AuthenticationError(f"the password file, {self._path}, {problem}")
        return (self._username, self._password) if self._username else (self._password,)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        return self.get_credentials()


def _introduction(*, tls: bool, logs_in: bool) -> dict[str, Any]:
    # With TLS 1.3, a pool refuses a connection that has not been read from yet: the server's session tickets are waiting in
    # it.
    return {} if tls and not logs_in else _SILENT


def _lookup_options(url: RedisUrl, *, logs_in: bool) -> dict[str, Any]:
    """Options of connections that only ask where to connect: each gives up soon, and another server is asked."""
    return {
        "socket_timeout": LOOKUP_TIMEOUT,
        "socket_connect_timeout": LOOKUP_TIMEOUT,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
        **url.tls_options,
        **_introduction(tls=url.tls, logs_in=logs_in),
    }


def _account(url: RedisUrl, credentials: CredentialProvider | None) -> dict[str, Any]:
    if credentials:
        return {"credential_provider": credentials}
    return {"username": url.username or None, "password": url.password or None}


def client_options(url: RedisUrl, key: str, *, timeout: float, connect_timeout: float) -> dict[str, Any]:
    """What a connection pool needs to reach the server: `connection_class` and its arguments.

    Every server speaks RESP2. RESP3 has to be asked for with HELLO, which TencentDB for Redis, older Sentinels and many
    proxies refuse, and nothing here needs it.
    """
    credentials = _PasswordFile(url.password_file, url.username) if url.password_file else None
    found: dict[str, Any] = {
        **_account(url, credentials),
        "db": url.database,
        "protocol": 2,
        "socket_timeout": timeout,
        **_introduction(tls=url.tls, logs_in=bool(credentials or url.password)),
    }
    if url.kind == "socket":
        return found | {"connection_class": _SocketConnection, "path": url.path}
    found |= {"socket_connect_timeout": connect_timeout, "socket_keepalive": True, **url.tls_options}
    found["connection_class"] = _SSLConnection if url.tls else _Connection
    host, port = url.hosts[0]
    locator: Locator | None = None
    if url.kind == "sentinel":
        locator = SentinelLocator(url)
    elif url.kind == "cluster":
        locator = ClusterLocator(url, key, credentials)
    return found | {"host": host, "port": port, "locator": locator}


def connect(
    url: str | RedisUrl,
    *,
    key: str = "",
    timeout: float = ANSWER_TIMEOUT,
    connect_timeout: float = CONNECT_TIMEOUT,
    single_connection: bool = False,
    **options: Any,
) -> Redis:
    """Build a client; nothing is sent before its first command. Timeouts in seconds.

    `key` is any key of the app: on a cluster, it decides the node. A server that does not answer in time raises
    `TimeoutError`; one that is not the primary, `NotPrimary`. `options` are those of the library's connections. Raises
    `ValueError` for a URL that cannot be read.
    """
    place = read_redis_url(url) if isinstance(url, str) else url
    found = client_options(place, key, timeout=timeout, connect_timeout=connect_timeout)
    client = Redis(
        connection_pool=ConnectionPool(**found | options), single_connection_client=single_connection
    )
    client.auto_close_connection_pool = True
    return client


def retry_once() -> Retry:
    """For callers that must hear of a failure at once: only a dropped connection is reopened, and only once.

    Repeating a command whose answer was lost is safe for every script here.
    """
    return Retry(NoBackoff(), 1, supported_errors=(ConnectionError,))


#: The asyncio class for each of ours.
_FOR_ASYNCIO: dict[Any, Any] = {
    _Connection: _AsyncConnection,
    _SSLConnection: _AsyncSSLConnection,
    _SocketConnection: _AsyncSocketConnection,
}


def connect_async(url: str | RedisUrl, *, key: str = "", timeout: float, connections: int) -> AsyncRedis:
    """Build a client for asyncio with at most `connections`; a caller that needs one more waits up to `timeout` seconds."""
    place = read_redis_url(url) if isinstance(url, str) else url
    found = client_options(place, key, timeout=timeout, connect_timeout=timeout)
    found["connection_class"] = _FOR_ASYNCIO[found["connection_class"]]
    retry = AsyncRetry(NoBackoff(), 1, supported_errors=(ConnectionError,))
    pool = BlockingConnectionPool(max_connections=connections, timeout=timeout, retry=retry, **found)
    return AsyncRedis(connection_pool=pool)
