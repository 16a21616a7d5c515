"""What a file wants for a user, what the API has, and what follows from the two. Values in, values out.

::

    + set      the API has no value, the file has one
    ~ change   it has a different one
    - remove   it has one, and the file says null: nothing else ever removes a value
    = same     nothing to do
      newer    it has a different one, which is known to be newer than the file, so it stays

A user is not judged while an update is on its way: the API's answer would soon be outdated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

#: What may become of one value.
Kind = Literal["set", "change", "remove", "same", "newer"]
KINDS: tuple[Kind, ...] = ("set", "change", "remove", "same", "newer")

#: What becomes of one user. `differs`: at least one value is set, changed or removed. `newer`: what differs is newer than
#: the file. `unknown`: the API does not know the user. `in_motion`: an update is pending, in flight, or was just delivered.
#: `forgotten`: the API's values may be newer than the file, but that is no longer remembered.
Fate = Literal["differs", "same", "newer", "unknown", "in_motion", "forgotten"]
FATES: tuple[Fate, ...] = ("differs", "same", "newer", "unknown", "in_motion", "forgotten")

#: An app has 10 attributes. If its names are not known, a file can name any number: further ones are counted together.
MOST_NAMES, OTHER_NAMES = 50, "(others)"


class Want(NamedTuple):
    """What a file says about one attribute: its value, None to remove it, and when that was true (ms since 1970)."""

    value: str | None
    version: int


class Change(NamedTuple):
    """A change of one value, None = there is none. `version` is when the new value was true, in ms."""

    old: str | None
    new: str | None
    version: int

    @property
    def kind(self) -> Literal["set", "change", "remove"]:
        if self.old is None:
            return "set"
        return "remove" if self.new is None else "change"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What follows for one user. `kinds` has every attribute that the file names, `changes` those to write."""

    fate: Fate
    changes: Mapping[str, Change] = field(default_factory=dict)
    kinds: Mapping[str, Kind] = field(default_factory=dict)


def judge(
    wanted: Mapping[str, Want], have: Mapping[str, str] | None, known: Mapping[str, tuple[object, int]]
) -> Verdict:
    """Compare. `have` is None for a user that the API does not know; `known` are the values remembered as delivered, each
    with its version in ms.
    """
    if have is None:
        return Verdict("unknown")
    changes, kinds = dict[str, Change](), dict[str, Kind]()
    for name, (value, version) in wanted.items():
        old = have.get(name)
        delivered, newest = known.get(name, (None, 0))
        if old == value:
            kinds[name] = "same"
        elif newest > version and delivered != value:
            kinds[name] = "newer"
        else:
            # A value that was delivered as in the file, and is not there, was lost: it counts as of its delivery.
            changes[name] = change = Change(old, value, max(version, newest))
            kinds[name] = change.kind
    if changes:
        return Verdict("differs", changes, kinds)
    return Verdict("newer" if "newer" in kinds.values() else "same", changes, kinds)


@dataclass(slots=True)
class Tally:
    """How many users, and how many values of each attribute, are of each kind."""

    users: dict[Fate, int] = field(default_factory=lambda: dict.fromkeys(FATES, 0))
    values: dict[str, dict[Kind, int]] = field(default_factory=dict)

    def count(self, verdict: Verdict) -> None:
        """Count one user."""
        self.users[verdict.fate] += 1
        for name, kind in verdict.kinds.items():
            if name not in self.values and len(self.values) >= MOST_NAMES:
                name = OTHER_NAMES
            self.values.setdefault(name, dict.fromkeys(KINDS, 0))[kind] += 1

    def total(self, kind: Kind) -> int:
        """How many values of all attributes are of this kind."""
        return sum(counts[kind] for counts in self.values.values())

    @property
    def judged(self) -> int:
        """Users compared, whatever was found."""
        return sum(self.users.values())


# What is found when a plan is applied, after reading the API again.

#: `ready`: as planned. `done`: the API has the new values already. `changed`: neither is the case.
Standing = Literal["ready", "done", "changed", "unknown"]


def recheck(
    changes: Mapping[str, Change], have: Mapping[str, str] | None, newest: Mapping[str, int]
) -> tuple[Standing, Mapping[str, Change]]:
    """Whether a planned change still holds, and what is left of it to do."""
    if have is None:
        return "unknown", {}
    left = {}
    for name, change in changes.items():
        found = have.get(name)
        if found == change.new:
            continue
        # Also a value that was set to the same again: somebody has decided on it since.
        if found != change.old or newest.get(name, 0) > change.version:
            return "changed", {}
        left[name] = change
    return ("ready" if left else "done"), left
