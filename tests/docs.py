"""Writes the pages of `docs/` that are made from the code: `make docs`. A test holds them to it."""

from __future__ import annotations

from pathlib import Path

from tests.bench.rivals import page
from worker.delivery.policy import TABLE, UNKNOWN_ATTEMPTS, Verdict

ERROR_CODES = Path(__file__).parent.parent / "docs" / "error-codes.md"

REACTIONS = {
    Verdict.TRANSIENT: "The same users again, after an exponential back-off with full jitter. A failure costs an "
    "attempt only when a call made later has succeeded. Five calls failing in a row, over the whole fleet, are an "
    "outage: the line stops and probes after 1 s, doubling to 60 s.",
    Verdict.RATE: "Everybody pauses for a second, then the shared rate drops and searches for what is granted. "
    "Costs no attempt.",
    Verdict.CREDENTIAL: "A new UserSig, once for the whole fleet. When that is refused, too, the line stops.",
    Verdict.STOP: "The line stops for the whole fleet: users go back at no cost, updates are accepted as ever, one "
    "probe goes out after 30 s (60 s after 70050), doubling to 5 minutes.",
    Verdict.SHAPE: "Never sent again unchanged: halved until it passes, or a single user is left.",
    Verdict.USER: "In `ErrorList`: that user becomes a dead letter, the others are delivered. For the whole call: "
    "halved until the culprit is alone. When everybody is refused, the line stops instead. Before 60015, 70402 and "
    "90033 are halved, the app's attribute names are read: missing ones stop the line.",
    Verdict.UNKNOWN: f"Retried, {UNKNOWN_ATTEMPTS} attempts in all, then each user alone; who still fails is kept "
    "as a dead letter.",
}


def error_codes() -> str:
    """The page on error codes."""
    lines = [
        "# What imattr does about each error code",
        "",
        "The API answers HTTP 200 even on failure; the truth is in `ErrorCode` and `ErrorList`. Made by `make docs`",
        "from the table in [`worker/delivery/policy.py`](../worker/delivery/policy.py).",
        "",
        "| verdict | what is done |",
        "|---|---|",
        *(f"| {verdict} | {REACTIONS[verdict]} |" for verdict in Verdict),
        "| no answer (timeout, reset, 502, unreadable) | As transient, and the users are held for `IMATTR_HOLD` first, "
        "so that the old call cannot land after a newer one. |",
        "",
        "| code | meaning | verdict |",
        "|---|---|---|",
        *(
            f"| {code} | {rule.meaning} | {rule.verdict} |"
            for code, rule in sorted(TABLE.items())
            if code > 0
        ),
        f"| any other | in no document | {Verdict.UNKNOWN} |",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    ERROR_CODES.write_text(error_codes(), encoding="utf-8")
    page.write()
