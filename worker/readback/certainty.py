"""How certain a sample makes us: exact bounds for a share of a whole of which only a sample was checked.

These are the Clopper-Pearson bounds: whatever the true share is, at most one sample in twenty leads to a bound on its wrong
side. They hold for samples with replacement, and are a little too wide for samples without.
"""

from __future__ import annotations

import math

CONFIDENCE = 0.95

#: Halvings of the interval that contains a bound: enough for a float's precision.
_HALVINGS = 200


def at_most(wrong: int, judged: int, confidence: float = CONFIDENCE) -> float:
    """The largest share that is still plausible after `wrong` of `judged`; 1.0 if nobody was judged."""
    if wrong >= judged:
        return 1.0
    return _share(wrong, judged, 1 - confidence, wrong / judged, 1.0)


def between(wrong: int, judged: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The shares between which the true one lies, with half of the doubt on either side."""
    doubt = (1 - confidence) / 2
    least = _share(wrong - 1, judged, 1 - doubt, 0.0, wrong / judged) if wrong > 0 else 0.0
    return least, at_most(wrong, judged, 1 - doubt)


def in_words(wrong: int, judged: int, *, everybody: bool = False) -> str:
    """The result in a sentence without a subject; `everybody`: the sample is the whole, so nothing is left to chance."""
    counted = f"{wrong:,} of {judged:,} wrong"
    if not judged:
        return "nobody could be judged"
    if everybody:
        return counted if not wrong else f"{counted}: {_percent(wrong / judged)} %"
    confidence = f"with {CONFIDENCE:.0%} confidence".replace("%", " %")
    if not wrong:
        return f"{counted}: below {_percent(at_most(0, judged), up=True)} % {confidence}"
    least, most = between(wrong, judged)
    return f"{counted}: {_percent(wrong / judged)} %, between {_percent(least)} and {_percent(most)} % {confidence}"


def _share(most: int, judged: int, chance: float, low: float, high: float) -> float:
    """The share at which this is the chance that at most `most` of `judged` are wrong. It falls as the share grows."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if _chance_of_at_most(most, judged, middle) > chance:
            low = middle
        else:
            high = middle
    return high


def _chance_of_at_most(most: int, judged: int, share: float) -> float:
    """The chance of at most that many wrong ones: a binomial's lower tail."""
    if share <= 0.0:
        return 1.0
    if share >= 1.0:
        return float(most >= judged)
    # Terms fall on either side of the mean. Add them up from the end that is nearer to it, away from the mean, until they no
    # longer count; the other tail is 1 minus the sum.
    odds = share / (1 - share)
    if most < share * judged:
        total, term = 0.0, _chance(most, judged, share)
        for wrong in range(most, -1, -1):
            total += term
            if term <= 1e-17 * total:
                break
            term *= wrong / ((judged - wrong + 1) * odds)
        return min(1.0, total)
    total, term = 0.0, _chance(most + 1, judged, share)
    for wrong in range(most + 1, judged + 1):
        total += term
        if term <= 1e-17 * total:
            break
        term *= (judged - wrong) / (wrong + 1) * odds
    return max(0.0, 1.0 - total)


def _chance(wrong: int, judged: int, share: float) -> float:
    """The chance of exactly that many wrong ones."""
    if wrong > judged:
        return 0.0
    ways = math.lgamma(judged + 1) - math.lgamma(wrong + 1) - math.lgamma(judged - wrong + 1)
    return math.exp(ways + wrong * math.log(share) + (judged - wrong) * math.log1p(-share))


def _percent(share: float, *, up: bool = False) -> str:
    """A share in percent, with two significant digits, or three from 1 % on; `up`: with two, and never rounded down."""
    percent = 100 * share
    if percent <= 0:
        return "0"
    digits = max(0, (2 if percent >= 0.995 and not up else 1) - math.floor(math.log10(percent)))
    # A float's tiny excess over the last digit must not round it up to the next.
    shown = math.ceil(percent * 10**digits - 1e-9) / 10**digits if up else percent
    text = f"{min(100.0, shown):.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
