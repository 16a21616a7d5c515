"""Serves the console over HTTP until asked to stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator
from typing import Any

import structlog
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from worker.config import Settings
from worker.console.app import build_app
from worker.errors import ConfigError
from worker.state import connection
from worker.state.keys import Keys

#: Connections at once; seconds in which a request's headers must arrive, and for which an idle connection is kept.
CONNECTIONS, ARRIVES_IN, KEPT = 256, 15.0, 15
#: Seconds in which Redis must answer: people are waiting for the page.
CONNECT_TIMEOUT, ANSWER_TIMEOUT = 1.5, 4.0
#: Bytes of a request's headers.
MOST_HEADERS = 16_384

log = structlog.get_logger()


class _Impatient(H11Protocol):
    """Closes a connection on which no request arrives: uvicorn would wait forever for the rest of its headers.

    It does so sooner when there are many: a client that opens silent connections then pushes out only its own, instead of
    keeping everybody else out.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._since = self.loop.time()
        self._watch(None)
        if len(self.connections) > CONNECTIONS / 2:
            silent = [one for one in self.connections if isinstance(one, _Impatient) and one.waits]
            if silent:
                min(silent, key=lambda one: one._since).transport.close()

    @property
    def waits(self) -> bool:
        """Whether it is still waiting for a request."""
        return (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing()

    def _watch(self, before: object) -> None:
        cycle, waits = self.cycle, self.waits
        if waits and before == (cycle,):
            self.transport.close()
        if not self.transport.is_closing():
            self._timer = self.loop.call_later(ARRIVES_IN, self._watch, (cycle,) if waits else None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer:
            self._timer.cancel()
        super().connection_lost(exc)


class _Server(uvicorn.Server):
    """Stops cleanly when asked to: uvicorn would send itself the signal again afterwards."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield


def serve(settings: Settings) -> None:
    """Serve the console; raises `ConfigError` if the settings do not allow it, and `OSError` if the port cannot be used."""
    key = Keys(settings.sdkappid).pending
    with connection.connect(
        settings.redis, key=key, timeout=ANSWER_TIMEOUT, connect_timeout=CONNECT_TIMEOUT
    ) as redis:
        app = build_app(settings, redis)
        listener = _listen(settings.console_host, settings.console_port)
        config = uvicorn.Config(
            app,
            http=_Impatient,
            ws="none",
            lifespan="off",
            log_config=None,
            # Malformed requests of strangers are not worth a log line each.
            log_level="error",
            access_log=False,
            # `caller` reads what proxies say, and believes only our own.
            proxy_headers=False,
            server_header=False,
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=KEPT,
            timeout_graceful_shutdown=5,
            h11_max_incomplete_event_size=MOST_HEADERS,
        )
        log.info("console_started", host=settings.console_host, port=settings.console_port)
        asyncio.run(_Server(config).serve([listener]))
        log.info("console_stopped")


def _listen(host: str, port: int) -> socket.socket:
    if not host:
        return socket.create_server(
            ("", port),
            family=socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET,
            dualstack_ipv6=socket.has_dualstack_ipv6(),
            backlog=128,
        )
    try:
        [(family, *_), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror:
        raise ConfigError([f"IMATTR_CONSOLE_HOST: {host} is not an address of this machine"]) from None
    return socket.create_server((host, port), family=family, backlog=128)
