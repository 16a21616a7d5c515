"""Makes Celery withstand whatever a queue holds, and whatever the broker answers.

Celery ends the worker on an exception that it does not expect, and the message that caused it goes to the next worker. So
unusable messages are kept among the refused updates here, before Celery sees them; and unexpected errors are waited out like
a lost connection.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from queue import Empty
from typing import Any

import structlog
from celery.worker.consumer import Consumer
from kombu import compression
from kombu.transport import redis as redis_transport
from kombu.utils.json import dumps

from worker import runtime
from worker.errors import InvalidUpdate
from worker.intake.celery_message import UPDATE, UPDATE_MANY, Envelope, decompressed, read
from worker.redis_url import RedisUrl
from worker.state.connection import ConnectionError as RedisConnectionError
from worker.state.connection import DataError, OutOfMemoryError, Redis, RedisError, client_options
from worker.state.scripts import text

log = structlog.get_logger()

#: Seconds until a worker whose broker answers with errors tries again.
RETRY_AFTER = 1.0


def keep(rule: str, raw: object) -> None:
    """Keep a message that Celery could not use; raises what Redis raises."""
    text = bytes(raw).decode(errors="replace") if isinstance(raw, bytes | memoryview) else str(raw)
    log.warning("message_refused", source="celery", rule=rule)
    runtime.refused().keep("celery", [(InvalidUpdate("?", rule), text)])


#: Lets a script write on a full server, which refuses a script's first write if that may need memory, but none that follow.
#: This first write needs none and never changes anything.
_DESPITE_FULL_MEMORY = "redis.pcall('SREM', KEYS[1], '')\n"


def _despite_full_memory(command: str) -> str:
    """A script that runs a command. The command is part of the text: some services refuse a script that hides it."""
    return f"{_DESPITE_FULL_MEMORY}return redis.call('{command}', KEYS[1], unpack(ARGV))"


#: Deletes a binding table that was not refreshed in time. KEYS: the deadlines, the table, and the set of permanent bindings,
#: which keep the table. ARGV: the exchange, now in ms.
_SWEEP = """
local deadline = tonumber(redis.call('ZSCORE', KEYS[1], ARGV[1]) or nil)
if deadline and deadline <= tonumber(ARGV[2]) then
  if redis.call('EXISTS', KEYS[3]) == 0 then
    redis.call('DEL', KEYS[2])
  end
  redis.call('ZREM', KEYS[1], ARGV[1])
end
"""


#: Where our brokers are, by name: the options of a transport hold only the name, since `celery inspect` prints them.
_PLACES: dict[str, RedisUrl] = {}


def name_of(place: RedisUrl) -> str:
    """Return a name for the place, as the transport option `place`."""
    name = f"broker {len(_PLACES)}"
    _PLACES[name] = place
    return name


def _sturdy(client: Any) -> Any:
    """A kombu client whose writes a full server accepts: they are tickets, and without those nothing would make room.

    It also does without MULTI, which clusters of TencentDB refuse. Commands that kombu sends together may safely be seen half
    done.
    """
    execute, pipeline, register = client.execute_command, client.pipeline, client.register_script

    def once_more(args: Any) -> Any:
        name, key, *rest = args
        return Redis.execute_command(client, "EVAL", _despite_full_memory(name), 1, key, *rest)  # type: ignore[no-untyped-call]

    def register_script(script: str) -> Any:
        return register(f"{_DESPITE_FULL_MEMORY}{script}")

    def execute_command(*args: Any, **options: Any) -> Any:
        try:
            return execute(*args, **options)
        except OutOfMemoryError:
            prefixed = getattr(client, "_prefix_args", list)
            return once_more(prefixed(list(args)))

    def without_multi(*_: Any, **__: Any) -> Any:
        pipe = pipeline(False)
        run = pipe.execute

        def execute_all(raise_on_error: bool = True) -> Any:
            commands = [args for args, _ in pipe.command_stack]
            try:
                return run(raise_on_error)
            except OutOfMemoryError:
                return [once_more(args) for args in commands]

        pipe.execute = execute_all
        return pipe

    client.execute_command, client.pipeline = execute_command, without_multi
    client.register_script = register_script
    return client


class SturdyChannel(redis_transport.Channel):
    """kombu's Redis channel, with one client per connection pool, with RESP2, and keeping messages that cannot be read.

    Creating a client costs more than the command: kombu creates one for each, which takes a sixth of a worker's CPU. Every
    server speaks RESP2, while older ones, and proxies, refuse the command that asks for RESP3.
    """

    from_transport_options: tuple[str, ...] = (*redis_transport.Channel.from_transport_options, "place")  # type: ignore[assignment]
    #: The name of the place where the broker is, if our settings say that; else kombu reads its own URL.
    place = ""
    _client_of_pool: Any = None
    #: What was popped from a queue last, until it is delivered.
    _popped: Any = None

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        transport = self.connection
        if transport is None or getattr(transport, "client", None) is None:
            # A channel of a connection that is gone: the same as a lost connection.
            raise RedisConnectionError("the connection is closed")
        place = _PLACES.get(self.place)
        if place is None:
            options: dict[str, Any] = super()._connparams(asynchronous=asynchronous)  # type: ignore[no-untyped-call]
            return options | {"protocol": 2}
        times: dict[str, Any] = {
            "timeout": self.socket_timeout,
            "connect_timeout": self.socket_connect_timeout,
        }
        ours = client_options(place, self.global_keyprefix, **times)
        # kombu derives a class from it that tells the channel when the connection is lost.
        self.connection_class = self.connection_class_ssl = ours.pop("connection_class")
        found: dict[str, Any] = super()._connparams(asynchronous=asynchronous)  # type: ignore[no-untyped-call]
        kept = ("connection_class", "health_check_interval", "max_connections", "client_name")
        return {name: found[name] for name in kept if name in found} | ours

    def _create_client(self, asynchronous: bool = False) -> Any:
        if asynchronous:
            return _sturdy(self._watched(super()._create_client(asynchronous=True)))  # type: ignore[no-untyped-call]
        # A reconnect gives the channel another pool.
        if self._client_of_pool is None or self._client_of_pool.connection_pool is not self.pool:
            self._client_of_pool = _sturdy(super()._create_client())  # type: ignore[no-untyped-call]
        return self._client_of_pool

    def sweep_bindings(self, limit: int = 100) -> int:
        """Delete binding tables that were not refreshed in time; returns how many were overdue.

        Replaces kombu's script, which builds the names of its keys itself: services that check scripts refuse it, once a
        second for each worker.
        """
        prefix = self.global_keyprefix
        deadlines = prefix + self.keyprefix_binding_deadlines
        with self.conn_or_acquire() as client:
            # Bypasses kombu's client, which would put the prefix before the first key only.
            run = partial(Redis.execute_command, client)
            seconds, micros = run("TIME")
            now = seconds * 1000 + micros // 1000
            overdue = run("ZRANGEBYSCORE", deadlines, "-inf", now, "LIMIT", 0, limit)
            for exchange in map(text, overdue):
                table = prefix + self.keyprefix_queue % (exchange,)
                permanent = prefix + self.keyprefix_binding_permanent % (exchange,)
                run("EVAL", _SWEEP, 3, deadlines, table, permanent, exchange, now)
        return len(overdue)

    def _watched(self, client: Any) -> Any:
        """The client that pops messages, made to note each until it is delivered."""
        parse: Callable[..., Any] = client.parse_response

        def noted(connection: Any, command: str, **options: Any) -> Any:
            self._popped = None
            answer = parse(connection, command, **options)
            self._popped = answer if command == "BRPOP" else None
            return answer

        client.parse_response = noted
        return client

    def _brpop_read(self, **options: Any) -> Any:
        self._popped = None
        try:
            return super()._brpop_read(**options)  # type: ignore[no-untyped-call]
        except Exception as error:
            # A DataError, redis-py's own refusal to send something, is the message's fault.
            if isinstance(error, Empty | RedisError | OSError) and not isinstance(error, DataError):
                raise
            self._keep_popped(error)
            return True

    def _keep_popped(self, error: Exception) -> None:
        """Keep the message that was popped and could not be delivered; raises `error` if there is none."""
        if not self._popped:
            raise error
        queue, message = self._popped
        try:
            keep(f"Celery cannot read the message ({type(error).__name__})", message)
        except RedisError:
            # Nothing else has it: Celery records a message only after reading it.
            with self.conn_or_acquire() as client:
                client.rpush(queue, message)
            raise

    def _receive_one(self, c: Any) -> Any:
        try:
            return super()._receive_one(c)  # type: ignore[no-untyped-call]
        except (Empty, RedisError, OSError):
            raise
        except Exception as error:
            # A broadcast, such as a command of `celery inspect`: nothing is lost with it.
            log.warning("broadcast_dropped", error=type(error).__name__)
            return None


# A patch, because naming a transport of our own in the settings would put its module path in place of `redis` into the
# URL of the broker that the worker's banner and Flower show.
redis_transport.Transport.Channel = SturdyChannel
redis_transport.SentinelTransport.Channel = SturdyChannel  # type: ignore[assignment]


def _check(message: Any) -> None:
    """Refuse an update that Celery could not pass to its task, and take callbacks out; raises `InvalidUpdate`.

    A task whose arguments or callbacks are malformed fails outside its body: silently, and its slot in the pool is lost.
    """
    headers = message.headers
    if type(headers) is not dict or message.errors:
        return
    task = headers.get("task")
    if task is None and type(message.payload) is dict:
        task = message.payload.get("task")
    if type(task) is not str or task not in (UPDATE, UPDATE_MANY):
        return
    # kombu has decompressed it already.
    unpacked = {name: value for name, value in headers.items() if name != "compression"}
    kind, encoding = message.content_type, message.content_encoding
    read(Envelope(bytes(message.body), kind, encoding, unpacked, message.properties), 0)
    if type(message.payload) is dict:
        message.payload.update(callbacks=None, errbacks=None, chord=None)
        return
    args, kwargs, embed = message.payload
    if embed:
        message.content_encoding = "utf-8"
        message.body = dumps([args, kwargs, {}]).encode()  # type: ignore[no-untyped-call]
        message._decoded_cache = None


# kombu would decompress a bomb of any size as soon as it sees the message.
for _kind in ("application/x-gzip", "application/x-bz2", "application/x-lzma"):
    _pack, _ = compression.get_encoder(_kind)  # type: ignore[no-untyped-call]
    compression.register(_pack, partial(decompressed, compression=_kind), _kind)  # type: ignore[no-untyped-call]


class SturdyConsumer(Consumer):  # type: ignore[misc]  # Celery has no type hints
    """Celery's consumer, made to carry on after every error."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # What the consumer waits out: everything. READONLY, OOM and the like are answers, not lost connections, but end
        # in the same way: the server is repaired, or fails over.
        self.connection_errors = (Exception,)

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        handle = super().create_task_handler(*args, **kwargs)
        # KeyError is among the errors of kombu's Redis transport, and of messages.
        lost = tuple(kind for kind in self.conninfo.connection_errors if kind is not KeyError)

        def sturdy(message: Any) -> Any:
            try:
                _check(message)
                return handle(message)
            except InvalidUpdate as error:
                self._refuse(message, error.rule)
            except (RedisError, *lost):
                raise
            except Exception as error:
                self._refuse(message, f"Celery cannot use the message ({type(error).__name__})")

        return sturdy

    def on_unknown_message(self, body: Any, message: Any) -> None:
        self._refuse(message, "the message is not a task")

    def on_unknown_task(self, body: Any, message: Any, exc: Any) -> None:
        self._refuse(message, "the task is unknown")

    def on_invalid_task(self, body: Any, message: Any, exc: Any) -> None:
        self._refuse(message, f"the message is not a valid task ({type(exc).__name__})")

    def on_decode_error(self, message: Any, exc: Any) -> None:
        if message.channel is not self.task_consumer.channel:
            # A broadcast, which comes by a channel of its own: no update, and nothing to acknowledge.
            log.warning("broadcast_dropped", error=type(exc).__name__)
            return
        self._refuse(message, f"the message cannot be decoded ({type(exc).__name__})")

    def _refuse(self, message: Any, rule: str) -> None:
        """Keep a message and acknowledge it; if it cannot be kept, it stays with the broker."""
        keep(rule, message.body)
        message.ack()

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        super().on_connection_error_before_connected(exc)
        time.sleep(RETRY_AFTER)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        log.warning("broker_interrupted", error=type(exc).__name__)
        try:
            super().on_connection_error_after_connected(exc)
        except Exception as error:
            log.warning("broker_interrupted", error=type(error).__name__)
        if not isinstance(exc, self.conninfo.connection_errors):
            time.sleep(RETRY_AFTER)
