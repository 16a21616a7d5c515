"""The ACL rules of the Redis user that this fleet runs as: its keys, its channels, its commands, and nothing else.

Needs no Redis. Commands in scripts are read from the scripts; a server checks them as if the user had sent them. Those that
Python, kombu and Celery send are listed here: a test runs everything as that user, and finds those that are missing or
superfluous.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from worker.config import Settings
from worker.redis_url import RedisUrl
from worker.state import scripts
from worker.state.keys import Keys

#: The user to name if the URL names none, or only the one that every server has.
USER, EVERYBODY = "imattr", "default"

#: Commands for every server: to see whether it is up, and to run scripts.
_EVERYWHERE = {"ping", "evalsha", "script|load"}

#: Commands for the state's keys, beside those in its scripts.
_STATE = _EVERYWHERE | {
    *("del", "get", "set", "pttl", "info", "time"),
    *("hdel", "hget", "hgetall", "hincrby", "hlen", "hmget", "hrandfield", "hscan", "hset"),
    *("sadd", "smembers", "srem"),
    *("xack", "xadd", "xdel", "xlen", "xrange", "xreadgroup", "xrevrange", "xtrim"),
    *("zadd", "zcard", "zrange", "zrangebyscore", "zrem", "zscan"),
}  # fmt: skip
#: For remembering in the state what RabbitMQ has delivered.
_TAKEN = {"zmscore", "zremrangebyscore"}

#: Commands for the broker's keys: those of kombu, and of its scripts; the intake waits with `blmove`, and tickets reach a
#: full server with `eval`.
_BROKER = _EVERYWHERE | {
    *("del", "exists", "get", "set", "time", "info"),
    *("brpop", "lpush", "llen", "rpop", "rpush", "blmove"),
    *("hdel", "hget", "hset"),
    *("sadd", "sinter", "smembers", "srem"),
    *("zadd", "zrange", "zrangebyscore", "zrem"),
    *("watch", "unwatch", "multi", "exec"),
    *("publish", "psubscribe", "punsubscribe"),
    *("eval", "script|exists"),
}  # fmt: skip
#: The scripts whose keys are the broker's.
_BROKER_SCRIPTS = ("take", "stamp", "finish")

#: Celery's keys, as patterns. Queues have a list for each priority; `*.celery.pidbox` holds commands and answers of `celery
#: inspect`, `celeryev` events for Flower, and `celery` is the default queue, in which the doctor looks for stray messages.
_BROKER_KEYS = (
    *("updates", "updates??[369]", "updates.taken", "updates.taken_at"),
    *("deliveries", "deliveries??[369]"),
    *("unacked", "unacked_index", "unacked_mutex"),
    *("_kombu.binding*", "*.celery.pidbox*", "celeryev.*", "celery"),
)
#: Celery's channels. Subscribers name a pattern, which must appear here literally.
_BROKER_CHANNELS = ("/{db}.celery.pidbox", "/{db}.celeryev/*")


@dataclass(frozen=True, slots=True)
class Access:
    """A user of one server. `server` names it in words."""

    server: str
    user: str
    rules: str

    @property
    def line(self) -> str:
        """The command that creates the user; with `user` in place of `ACL SETUSER`, the line of an ACL file."""
        return f"ACL SETUSER {self.user} {self.rules}"


def accesses(settings: Settings) -> list[Access]:
    """The user of each server: only one if the broker shares the state's; none for a broker that is not Redis."""
    state, broker = settings.redis, settings.broker
    keys = _state_keys(settings)
    commands = _state_commands(settings) | _way_to(state)
    if broker is None:
        commands |= _TAKEN
    if broker is None or not _same(state, broker):
        found = [_access("the state", state, keys, [], commands)]
        if broker:
            found.append(
                _access(
                    "Celery's broker",
                    broker,
                    _broker_keys(settings.celery_prefix),
                    _broker_channels(settings.celery_prefix, broker.database),
                    _broker_commands() | _way_to(broker),
                )
            )
    else:
        keys = [*keys, *_broker_keys(settings.celery_prefix)]
        channels = _broker_channels(settings.celery_prefix, broker.database)
        both = "the state and Celery's broker"
        found = [_access(both, state, keys, channels, commands | _broker_commands() | _way_to(broker))]
    return [*found, *_sentinels(place for place in (state, broker) if place)]


def _same(one: RedisUrl, other: RedisUrl) -> bool:
    """Whether both are the same user of the same server. Databases share its users."""
    return all(
        getattr(one, name) == getattr(other, name)
        for name in ("kind", "hosts", "path", "service", "username")
    )


def _state_keys(settings: Settings) -> list[str]:
    return [Keys(settings.sdkappid).pattern]


def _state_commands(settings: Settings) -> set[str]:
    found = _STATE | _in_scripts(name for name in scripts.names() if name not in _BROKER_SCRIPTS)
    if settings.replicas:
        found.add("waitaof" if settings.replicas_fsync else "wait")
    return found


def _broker_keys(prefix: str) -> list[str]:
    return [prefix + key for key in _BROKER_KEYS]


def _broker_channels(prefix: str, database: int) -> list[str]:
    return [prefix + channel.format(db=database) for channel in _BROKER_CHANNELS]


def _broker_commands() -> set[str]:
    return _BROKER | _in_scripts(_BROKER_SCRIPTS)


def _way_to(place: RedisUrl) -> set[str]:
    """The commands for finding the server, and its database."""
    return ({"cluster|slots"} if place.kind == "cluster" else set()) | (
        {"select"} if place.database else set()
    )


def _in_scripts(names: Iterable[str]) -> set[str]:
    found = set()
    for name in names:
        called = re.findall(r"redis\.p?call\('(\w+)'(?:, '(CREATE)')?", scripts.source(name))
        found |= {"|".join(filter(None, words)).lower() for words in called}
    return found


def _access(
    server: str, place: RedisUrl, keys: Iterable[str], channels: Iterable[str], commands: Iterable[str]
) -> Access:
    user = place.username if place.username not in ("", EVERYBODY) else USER
    # Redis 6.2 lets a new user publish to all channels, unless that is revoked.
    rules = ["reset on >PASSWORD resetchannels -@all"]
    rules += [f"~{key}" for key in keys]
    rules += [f"&{channel}" for channel in channels]
    rules += [f"+{command}" for command in sorted(commands)]
    return Access(f"{server}, {place}", user, " ".join(rules))


def _sentinels(places: Iterable[RedisUrl]) -> Iterator[Access]:
    """The users of sentinels, which are servers of their own."""
    users = {place.sentinel_username: place for place in places if place.sentinel_username}
    for user, place in users.items():
        rules = "reset on >PASSWORD resetchannels -@all +sentinel|get-master-addr-by-name +sentinel|master"
        yield Access(f"the sentinels of {place.service}", user, rules)
