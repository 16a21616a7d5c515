"""Answers a question that people ask: why does the API have, or not have, this value?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from worker.models import UserId
from worker.operate.status import iso, span
from worker.state.connection import Redis
from worker.state.keys import Keys
from worker.state.refused import Refused, RefusedUpdate
from worker.state.users import UserState, Values


@dataclass(frozen=True, slots=True)
class Answer:
    """One sentence, and its evidence, line by line."""

    sentence: str
    proof: tuple[str, ...]


#: How many refused updates, the newest, are searched for those of a user.
REFUSED = 1000


def refusals_of(redis: Redis, keys: Keys, user: UserId) -> list[RefusedUpdate]:
    """The updates of a user that were refused lately, newest first."""
    return [one for one in Refused(redis, keys).newest(REFUSED) if one.user == user]


def explain(
    user: UserState, name: str, state: Mapping[str, Any], refused: Sequence[RefusedUpdate], remembered: float
) -> Answer:
    """Why the API has the newest value of an attribute, or has not.

    `state` is what `status.read` returns, `refused` the updates of this user that were refused lately, newest first;
    `remembered` is how long delivered values are, in seconds.
    """
    proof = [*_proof(user, name), *(_refusal(one) for one in refused[:1])]
    return Answer(_sentence(user, name, state, refused, remembered), tuple(proof))


def _sentence(
    user: UserState, name: str, state: Mapping[str, Any], refused: Sequence[RefusedUpdate], remembered: float
) -> str:
    what = f"{name} of {user.user}"
    older = " (the API has an older value)" if user.delivered and _known(user, name) else ""
    if user.in_flight and name in user.in_flight.values:
        newer = ", and a newer value waits behind it" if user.pending and name in user.pending.values else ""
        return f"{what} is being sent now, in batch {user.batch or '?'}{newer}."
    if user.pending and name in user.pending.values:
        return f"{what} is accepted and not sent yet{older}: {_reason(user, state)}."
    if user.dead and name in user.dead.values:
        letter = user.dead
        return (
            f"{what} was given up {span((user.now_ms - letter.at_ms) / 1000)} ago after "
            f"{letter.attempts} {'attempt' if letter.attempts == 1 else 'attempts'}{older}: {letter.message} ({letter.code}). "
            f"imattr dead redrive --user {user.user} sends it again."
        )
    if user.delivered and name in user.delivered.values:
        done = user.delivered
        if name in done.unknown:
            return f"It is unknown what the API has for {what}: its dead letter was deleted, or a newer value replaced it."
        value, version = done.values[name]
        verb = "has" if value else "has no longer"
        return (
            f"The API {verb} the newest value of {what}: batch number {done.call or '?'} delivered it "
            f"{span((user.now_ms - done.at_ms) / 1000)} ago, as of {iso(version / 1000)}."
        )
    if refused:
        return f"The last update of {user.user} was refused: {refused[0].rule}."
    return (
        f"Nothing is known of {what}: no update is pending, in flight or given up, and none was delivered in the last "
        f"{span(remembered)}, for which deliveries are remembered (IMATTR_SHADOW_TTL)."
    )


def _known(user: UserState, name: str) -> bool:
    return bool(user.delivered and name in user.delivered.values and name not in user.delivered.unknown)


def _reason(user: UserState, state: Mapping[str, Any]) -> str:
    """Why a pending user is not being sent."""
    line = state["line"]
    if line["state"] != "open":
        return f"the line is {line['words'].rstrip('.')}"
    if not state["workers"]:
        return "no worker is alive"
    waiting = user.pending
    if user.in_flight:
        return "an earlier value of this user is being sent, and must end first"
    if user.delayed_until_ms and user.delayed_until_ms > user.now_ms:
        wait = span((user.delayed_until_ms - user.now_ms) / 1000)
        tried = f" after {waiting.attempts} failed attempts" if waiting and waiting.attempts else ""
        return f"it is held for another {wait}{tried}"
    users = state["measured"]["1min"]["users_per_s"]
    eta = f", about {span(user.place / users)} at the measured pace" if users else ""
    return f"{user.place:,} users are ahead of it in the lane {user.lane}{eta}"


def _proof(user: UserState, name: str) -> list[str]:
    """What is stored, without the values."""
    lines = []
    if user.pending:
        lines.append(
            f"pending since {iso(user.pending.since_ms / 1000)}{_version(user.pending.values, name)}"
        )
    if user.in_flight:
        lease = iso(user.lease_ends_ms / 1000) if user.lease_ends_ms else "?"
        lines.append(f"in flight, lease until {lease}{_version(user.in_flight.values, name)}")
    if user.delivered:
        told = (
            f"last delivery at {iso(user.delivered.at_ms / 1000)}, batch number {user.delivered.call or '?'}"
        )
        lines.append(f"{told}{_version(user.delivered.values, name)}")
    if user.dead:
        lines.append(f"dead letter of {iso(user.dead.at_ms / 1000)}{_version(user.dead.values, name)}")
    lines += [f"what is stored as {table} cannot be read" for table in user.damaged]
    return lines


def _version(values: Values, name: str) -> str:
    return f", {name} as of {iso(values[name][1] / 1000)}" if name in values else f", without {name}"


def _refusal(one: RefusedUpdate) -> str:
    return f"refused at {iso(one.at_ms / 1000)} ({one.source}): {one.rule}; see imattr refused show {one.id}"


def facts(user: UserState, *, values: bool) -> dict[str, Any]:
    """What is known about a user, as a dictionary; with the text of values if `values`, else only their versions."""

    def shown(found: Values) -> dict[str, Any]:
        return {
            name: {"value": value, "as_of": iso(version / 1000)} if values else iso(version / 1000)
            for name, (value, version) in found.items()
        }

    pending, sent, done, dead = user.pending, user.in_flight, user.delivered, user.dead
    until = user.delayed_until_ms
    return {
        "user": user.user,
        "pending": pending
        and {
            "lane": user.lane or ("delayed" if until else "waiting"),
            "users_before": user.place if user.lane else None,
            "not_before": iso(until / 1000) if until else None,
            "since": iso(pending.since_ms / 1000),
            "attempts": pending.attempts,
            "suspect": pending.suspect,
            "attributes": shown(pending.values),
        },
        "in_flight": sent
        and {
            "batch": user.batch,
            "lease_ends": iso(user.lease_ends_ms / 1000) if user.lease_ends_ms else None,
            "since": iso(sent.since_ms / 1000),
            "attempts": sent.attempts,
            "attributes": shown(sent.values),
        },
        "delivered": done
        and {
            "at": iso(done.at_ms / 1000),
            "batch_number": done.call or None,
            "attributes": shown(done.values),
            "unknown": sorted(done.unknown),
        },
        "dead": dead
        and {
            "at": iso(dead.at_ms / 1000),
            "code": dead.code,
            "message": dead.message,
            "attempts": dead.attempts,
            "attributes": shown(dead.values),
        },
        "damaged": list(user.damaged),
    }
