"""The verdict on one user: does the API have what was delivered?

A verdict can know little, since the API records neither when nor by whom a value was written. Attributes that were set
together have the same version, and travel in one call that lands as a whole. So if some of them are there and others are not,
the call did land, and somebody else changed the others: *changed*. If none of the attributes that were set together is there,
it looks as if the call never landed: *lost*. Removals travel in a call of their own, and are judged by themselves.

It errs towards *lost* for a single attribute that somebody else changed, and towards *changed* if a call was lost and one of
its values happened to be there before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from worker.state.shadow import UNKNOWN, Known

Verdict = Literal["as_delivered", "lost", "changed", "gone"]

#: The bad verdicts, the worst first; and all verdicts.
WRONG: tuple[Verdict, ...] = ("lost", "changed", "gone")
VERDICTS: tuple[Verdict, ...] = ("as_delivered", *WRONG)


@dataclass(frozen=True, slots=True)
class Difference:
    """An attribute that is not as delivered. None means no value."""

    delivered: str | None
    found: str | None
    version: int
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict on a user, with the attributes that it is based on."""

    verdict: Verdict
    differences: Mapping[str, Difference]


def judge(known: Known, found: Mapping[str, str] | None) -> Judgement | None:
    """Compare what is remembered about a user with what the API has, None = it does not know the user.

    Returns None if nothing is known that could be compared.
    """
    sets: dict[tuple[int, bool], dict[str, str | None]] = {}
    for name, (value, version) in known.values.items():
        if value is not UNKNOWN:
            sets.setdefault((version, value is None), {})[name] = value
    if not sets:
        return None
    differences: dict[str, Difference] = {}
    for (version, _), delivered in sets.items():
        have = {name: None if found is None else found.get(name) for name in delivered}
        wrong = [name for name, value in delivered.items() if have[name] != value]
        landed = len(wrong) < len(delivered)
        verdict: Verdict = "gone" if found is None else "changed" if landed else "lost"
        for name in wrong:
            differences[name] = Difference(delivered[name], have[name], version, verdict)
    verdicts = {difference.verdict for difference in differences.values()}
    return Judgement(next((one for one in WRONG if one in verdicts), "as_delivered"), differences)
