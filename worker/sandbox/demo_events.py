"""Realistic application events for the demo: 60,000 lines about 12,000 users, the same for each seed.

Cities, countries, languages and time zones are real, in the user's own language and writing system (CLDR data, from the
package babel), so the limit of 50 *bytes* bites: a name that fits in Latin letters often does not in Thai or Tamil. Some
users are hot. As with real producers, some events come twice, some come late, after newer ones, and some lines are invalid.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, NamedTuple

from babel import Locale
from babel.core import get_global

EVENTS, USERS = 60_000, 12_000

#: The attributes that the demo's app has.
NAMES = ("city", "country", "language", "time_zone", "level", "membership")

_LOCALES = [
    "zh_CN",
    "zh_TW",
    "ja",
    "ko",
    "th",
    "vi",
    "id",
    "hi",
    "ta",
    "te",
    "bn",
    "ml",
    "kn",
    "gu",
    "ur",
    "fa",
    "ar",
    "he",
    "ru",
    "uk",
    "el",
    "ka",
    "hy",
    "am",
    "km",
    "my",
    "si",
    "tr",
    "pl",
    "de",
    "fr",
    "es",
    "pt_BR",
    "it",
    "nl",
    "sw",
    "en",
]
_LEVELS = ("Bronze", "Silver", "Gold", "Platinum", "Diamond")
_MEMBERSHIPS = ("free", "trial", "plus", "premium", "family")
_START = datetime(2026, 11, 1, tzinfo=UTC)


class Place(NamedTuple):
    """A city and its country, named in one language."""

    city: str
    country: str
    time_zone: str


@cache
def _places(locale: str) -> list[Place]:
    names = Locale.parse(locale)
    territories = get_global("zone_territories")
    return [
        Place(zone.get("city") or name.rpartition("/")[2].replace("_", " "), country, name)
        for name, zone in sorted(names.time_zones.items())
        if (country := names.territories.get(territories.get(name, "")))
    ]


@cache
def _languages(locale: str) -> list[str]:
    return sorted(Locale.parse(locale).languages.values())


def _user_ids(rng: random.Random) -> list[str]:
    """Ids as applications make them: numbers, names, opaque tokens."""
    ids: list[str] = []
    for n in range(0, USERS, 4):
        ids += [
            f"user{n:07d}",
            f"{13_000_000_000 + n * 7919}",
            f"u_{rng.getrandbits(64):016x}",
            f"player-{n}@game.example",
        ]
    return ids


def events(seed: int = 2026) -> Iterator[str]:
    """The lines, in the order in which they arrive."""
    rng = random.Random(seed)
    users = _user_ids(rng)
    homes = [rng.choice(_LOCALES) for _ in users]
    # A few users cause most events, and every user has at least one: signing up.
    hot = [1 / (rank + 20) for rank in range(USERS)]
    order = rng.choices(range(USERS), hot, k=EVENTS - USERS) + list(range(USERS))
    rng.shuffle(order)
    known: set[int] = set()
    sent: list[str] = []
    late: list[tuple[int, str]] = []
    for number, who in enumerate(order):
        # Unique times, at least half a second apart: it is never in doubt which of two events is newer.
        moment = _START + timedelta(milliseconds=number * 600 + rng.randrange(500))
        attrs = _change(rng, homes[who], first=who not in known)
        known.add(who)
        line = _line(users[who], attrs, moment, number)
        chance = rng.random()
        if chance < 0.004:
            line = _spoiled(rng, users[who], attrs, moment)
        elif chance < 0.034:
            late.append((number + rng.randrange(5, 3000), line))
            continue
        elif chance < 0.054 and sent:
            yield rng.choice(sent[-2000:])
        while late and late[0][0] <= number:
            yield late.pop(0)[1]
        sent.append(line)
        yield line
    for _, line in late:
        yield line


def _change(rng: random.Random, locale: str, *, first: bool) -> dict[str, str]:
    place = rng.choice(_places(locale))
    moved = {"city": place.city, "country": place.country, "time_zone": place.time_zone}
    language = {"language": rng.choice(_languages(locale))}
    level, membership = {"level": rng.choice(_LEVELS)}, {"membership": rng.choice(_MEMBERSHIPS)}
    if first:
        return moved | level | membership
    return rng.choices([moved, language, level, membership], [3, 1, 4, 2])[0]


def _line(user: str, attrs: dict[str, Any], moment: datetime, number: int) -> str:
    # Some producers write ISO 8601, some milliseconds, some escape everything beyond ASCII.
    time: str | int = moment.isoformat(timespec="milliseconds")
    if number % 3 == 0:
        time = round(moment.timestamp() * 1000)
    event = {"user": user, "attrs": attrs, "occurred_at": time}
    return json.dumps(event, ensure_ascii=number % 5 == 0)


def _spoiled(rng: random.Random, user: str, attrs: dict[str, str], moment: datetime) -> str:
    time = moment.isoformat()
    return rng.choice(
        [
            json.dumps({"user": user + "x" * 40, "attrs": attrs, "occurred_at": time}),
            json.dumps({"user": "用户" + user, "attrs": attrs, "occurred_at": time}),
            json.dumps({"user": 42, "attrs": attrs, "occurred_at": time}),
            json.dumps({"user": user, "attrs": {"level": 7}, "occurred_at": time}),
            json.dumps({"user": user, "attrs": {"city": ""}, "occurred_at": time}),
            json.dumps({"user": user, "attrs": {"shoe_size": "44"}, "occurred_at": time}),
            json.dumps({"user": user, "attrs": {}, "occurred_at": time}),
            json.dumps({"user": user, "attrs": attrs, "occurred_at": "yesterday"}),
            json.dumps({"user": user, "attrs": attrs})[:-9],
        ]
    )
