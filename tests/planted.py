"""Bugs that are planted on purpose, to see whether what shows a promise would notice if the promise were broken: `make bugs`.

Each is what a careless change might do, in a script or in Python: a text of a file, and the wrong one in its place. Those that the
model and the schedules must find are planted while the tests run; the others in a copy of the sources, in which the named tests
must fail. None may survive.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import pytest

from worker.state import scripts

ROOT = Path(__file__).parent.parent
LUA, DELIVERY, READBACK = "worker/state/lua/", "worker/delivery/", "worker/readback/"


class Promise(StrEnum):
    """What is promised, in the words of the README."""

    LOST = "Nothing accepted is lost"
    FAILOVER = "A failover of Redis is followed and noticed"
    NEWEST = "No old value overwrites a newer one"
    QUOTA = "Never more calls than the quota"
    SPEED = "Full speed"
    BAD_USER = "One bad user never blocks the others"
    LINE = "A configuration error or an outage stops the line and costs nothing"
    LEDGER = "The ledger balances"
    CHECKED = "What the API has can be checked"
    LEAKS = "No secret and no attribute value leaks"
    UNSTOPPABLE = "Nothing that comes in can stop a worker"


#: What pytest returns when there was nothing to run.
NO_TESTS = 5
#: What plants bugs while it runs: the test that takes the name of one. The rest of the strings are tests that must fail.
MODEL = "tests/state/test_state_machine.py::test_the_model_catches"
SCHEDULES = "tests/test_schedules.py::test_a_bug_in_a_script_is_found"


class Bug(NamedTuple):
    """One bug: what it does, where, the text as it is and as it would be, and the tests that must find it.

    `seed` is a schedule to begin with, for bugs that few schedules show.
    """

    promise: Promise
    what: str
    file: str
    right: str
    wrong: str
    found_by: str
    seed: int = 1

    @property
    def shared(self) -> bool:
        """Whether it is in what several scripts share."""
        return Path(self.file).stem in scripts.SHARED


#: Schedules from the first on find these, too, after up to 40 s; a seed from which it is quicker goes out of date when what
#: schedules draw is changed. Nothing fails then: the test is slow again.
BUGS = (
    Bug(
        Promise.NEWEST,
        "an old value overwrites a newer one when a batch comes back",
        LUA + "settle.lua",
        "      for name, pair in pairs(newer.a) do\n        record.a[name] = pair\n",
        "      for name, pair in pairs(newer.a) do\n        record.a[name] = record.a[name] or pair\n",
        MODEL,
    ),
    Bug(
        Promise.NEWEST,
        "an update with an old event time wins",
        LUA + "add.lua",
        "version >= known[2]",
        "version >= 0",
        MODEL,
    ),
    Bug(
        Promise.LOST,
        "a user in flight enters a lane, too",
        LUA + "add.lua",
        "if not in_flight[i] then",
        "if true then",
        MODEL,
    ),
    Bug(
        Promise.LOST,
        "a value that arrived during the flight is forgotten",
        LUA + "settle.lua",
        "  if newer then\n    enter_lane",
        "  if false then\n    enter_lane",
        MODEL,
    ),
    Bug(
        Promise.QUOTA,
        "a ticket is good for two claims",
        LUA + "claim.lua",
        "redis.call('ZREM', tickets, batch) == 0",
        "false",
        MODEL,
    ),
    Bug(
        Promise.NEWEST,
        "a reclaimed batch can still be settled",
        LUA + "reclaim.lua",
        "redis.call('HDEL', batches, expired)",
        "local _ = 0",
        MODEL,
    ),
    Bug(
        Promise.NEWEST,
        "a lost batch can be extended",
        LUA + "extend.lua",
        "redis.call('HEXISTS', batches, batch) == 0",
        "false",
        MODEL,
    ),
    Bug(
        Promise.LEDGER,
        "a merge is not counted",
        LUA + "settle.lua",
        "      counts.coalesced = counts.coalesced + 1\n      newer",
        "      newer",
        MODEL,
    ),
    Bug(
        Promise.NEWEST,
        "an update that changes nothing forgets its time",
        LUA + "add.lua",
        "repeated, known[2] = true, version",
        "repeated = true",
        MODEL,
    ),
    Bug(
        Promise.NEWEST,
        "a removal is taken for an unknown value",
        LUA + "add.lua",
        "value ~= cjson.null and value",
        "value",
        MODEL,
    ),
    Bug(
        Promise.LOST,
        "a claimed user stays pending",
        LUA + "claim.lua",
        "redis.call('HDEL', pending, unpack(users))",
        "local _ = 0",
        MODEL,
    ),
    Bug(
        Promise.SPEED,
        "backfill goes before live",
        LUA + "claim.lua",
        "'ZRANGE', live, 0, limit - 1",
        "'ZRANGE', backfill, 0, limit - 1",
        MODEL,
    ),
    Bug(
        Promise.LEDGER,
        "a redrive is not counted",
        LUA + "redrive.lua",
        "counts.redriven = counts.redriven + 1",
        "local _ = 0",
        MODEL,
    ),
    Bug(
        Promise.NEWEST,
        "a newer value leaves the old one in the dead letter",
        LUA + "add.lua",
        "letter.a[name][2] <= pair[2]",
        "false",
        MODEL,
    ),
    Bug(
        Promise.BAD_USER,
        "a retry costs no attempt",
        LUA + "settle.lua",
        "(record.n or 0) + cost",
        "(record.n or 0)",
        MODEL,
    ),
    Bug(
        Promise.LINE,
        "a failure of the service costs an attempt at once",
        LUA + "settle.lua",
        "failed_at and outage_ended_at < failed_at and failed_at < ok_at",
        "failed_at",
        MODEL,
    ),
    Bug(Promise.BAD_USER, "a suspect is forgotten", LUA + "settle.lua", "record.s = 1", "local _ = 0", MODEL),
    Bug(
        Promise.SPEED,
        "a worker goes on though there is no full batch",
        LUA + "settle.lua",
        "ready >= size",
        "ready >= 1",
        MODEL,
    ),
    Bug(
        Promise.SPEED,
        "a partial batch is not noted",
        LUA + "dispatch.lua",
        "redis.call('SET', partial_at, now)",
        "local _ = 0",
        MODEL,
    ),
    Bug(
        Promise.NEWEST, "a late call's value stays", LUA + "reassert.lua", "known[1] ~= value", "false", MODEL
    ),
    Bug(
        Promise.NEWEST,
        "what is in flight counts as sent after a late call",
        LUA + "reassert.lua",
        "in_flight[name] or delivered[name]",
        "not sent and delivered[name]",
        MODEL,
    ),
    Bug(
        Promise.NEWEST,
        "a late call hides what is pending",
        LUA + "reassert.lua",
        "not newest.a[name] and",
        "",
        MODEL,
    ),
    Bug(
        Promise.LOST,
        "a user sent again enters a lane while in flight",
        LUA + "reassert.lua",
        "if not sent then",
        "if true then",
        MODEL,
    ),
    Bug(
        Promise.LEDGER,
        "users sent again are not counted",
        LUA + "reassert.lua",
        "created = created + 1",
        "local _ = 0",
        MODEL,
    ),
    Bug(
        Promise.NEWEST,
        "an unknown outcome is forgotten",
        LUA + "settle.lua",
        "unknown == 1 and 1 or nil",
        "nil",
        MODEL,
    ),
    Bug(
        Promise.LINE,
        "nobody learns that the service works",
        LUA + "settle.lua",
        "'ok_at', claimed",
        "'ok_at', 0",
        MODEL,
    ),
    Bug(
        Promise.NEWEST,
        "a reclaimed batch can still be settled",
        LUA + "reclaim.lua",
        "redis.call('HDEL', batches, expired)",
        "local _ = 0",
        SCHEDULES,
    ),
    Bug(
        Promise.NEWEST,
        "a lost batch can be extended",
        LUA + "extend.lua",
        "redis.call('HEXISTS', batches, batch) == 0",
        "false",
        SCHEDULES,
        seed=52,
    ),
    Bug(
        Promise.NEWEST,
        "a batch that comes back overwrites what is newer",
        LUA + "settle.lua",
        "      for name, pair in pairs(newer.a) do\n        record.a[name] = pair\n",
        "      for name, pair in pairs(newer.a) do\n        record.a[name] = record.a[name] or pair\n",
        SCHEDULES,
    ),
    Bug(
        Promise.NEWEST,
        "an event from the past wins",
        LUA + "add.lua",
        "version >= known[2]",
        "version >= 0",
        SCHEDULES,
    ),
    Bug(
        Promise.NEWEST,
        "a clock set back makes new values old",
        LUA + "add.lua",
        "math.max(now, known and known[2] or 0, lost and lost[2] or 0)",
        "now",
        SCHEDULES,
        seed=7,
    ),
    Bug(
        Promise.LOST,
        "what arrived during the flight is forgotten",
        LUA + "settle.lua",
        "  if newer then\n    enter_lane",
        "  if false then\n    enter_lane",
        SCHEDULES,
    ),
    Bug(
        Promise.LOST,
        "a claimed user stays in its lane",
        LUA + "claim.lua",
        "  redis.call('ZREMRANGEBYRANK', live, 0, #users - 1)",
        "  local _ = 0",
        SCHEDULES,
    ),
    Bug(
        Promise.QUOTA,
        "two slots for one",
        LUA + "reserve.lua",
        "whole(slot + apart)",
        "whole(slot + math.floor(apart / 2))",
        SCHEDULES,
    ),
    Bug(
        Promise.NEWEST,
        "a newer value leaves the old one in the dead letter",
        LUA + "add.lua",
        "letter.a[name][2] <= pair[2]",
        "false",
        SCHEDULES,
        seed=41,
    ),
    Bug(
        Promise.LEDGER,
        "a redrive is not counted",
        LUA + "redrive.lua",
        "counts.redriven = counts.redriven + 1",
        "local _ = 0",
        SCHEDULES,
    ),
    Bug(
        Promise.FAILOVER,
        "a repeated value is believed to be there after a failover",
        LUA + "add.lua",
        " and is_trusted(user, since)",
        "",
        SCHEDULES,
        seed=11611,
    ),
    Bug(
        Promise.LOST,
        "a lease that ended is not reclaimed",
        LUA + "reclaim.lua",
        "'-inf', '(' .. now",
        "'-inf', '(' .. 0",
        SCHEDULES,
    ),
    Bug(Promise.LINE, "nobody probes", LUA + "dispatch.lua", "next_probe <= now", "false", SCHEDULES),
    Bug(
        Promise.UNSTOPPABLE,
        "a record that cannot be read ends a script",
        LUA + "settle.lua",
        "readable(sent[i])",
        "cjson.decode(sent[i])",
        SCHEDULES,
        seed=76,
    ),
    Bug(
        Promise.QUOTA,
        "an impatient caller rewinds the clock",
        LUA + "reserve.lua",
        "horizon + 2 * SECOND / limit",
        "patience",
        SCHEDULES,
    ),
    Bug(
        Promise.QUOTA,
        "the highest quota rules",
        LUA + "reserve.lua",
        "math.min(others, named)",
        "named",
        SCHEDULES,
    ),
    Bug(
        Promise.UNSTOPPABLE,
        "a term from the future is waited for",
        LUA + "campaign.lua",
        "and left <= term",
        "",
        SCHEDULES,
        seed=575,
    ),
    Bug(
        Promise.LOST,
        "a message that is to be accepted later is forgotten",
        LUA + "keep.lua",
        "redis.call('ZADD', scheduled, one[2], one[1])",
        "local _ = 0",
        SCHEDULES,
        seed=4,
    ),
    Bug(
        Promise.NEWEST,
        "a message counts as of two seconds before it was taken",
        LUA + "stamp.lua",
        "math.max(now,",
        "math.max(now - 2000,",
        SCHEDULES,
        seed=4,
    ),
    Bug(
        Promise.LOST,
        "Celery's messages are acknowledged before they are accepted",
        "worker/intake/celery_queue.py",
        "        self._unread, self._now_ms = self._taken.messages, now_ms\n",
        "        self._unread, self._now_ms = self._taken.messages, now_ms\n        self._queue.finish(self._taken)\n",
        "tests/intake/test_celery_queue.py",
    ),
    Bug(
        Promise.LOST,
        "taken messages are only in a process's memory",
        LUA + "take.lua",
        "redis.call('RPUSH', taken, mark, unpack(messages))",
        "local _ = 0",
        "tests/intake/test_celery_queue.py",
    ),
    Bug(
        Promise.LOST,
        "a stream entry without room is acknowledged",
        "worker/intake/stream.py",
        "for entry in entries if entry.id not in waiting]",
        "for entry in entries]",
        "tests/intake/test_stream.py",
    ),
    Bug(
        Promise.FAILOVER,
        "permits of the old server are good on the new one",
        LUA + "failover.lua",
        "whole(math.max(current + 1, epoch or 0))",
        "whole(current)",
        "tests/state/test_server.py",
    ),
    Bug(
        Promise.FAILOVER,
        "tickets of the old server are good on the new one",
        LUA + "failover.lua",
        "    redis.call('DEL', tickets)\n",
        "",
        "tests/state/test_server.py",
    ),
    Bug(
        Promise.FAILOVER,
        "a restart is not noticed",
        LUA + "failover.lua",
        "local moved = known and id ~= known",
        "local moved = false",
        "tests/state/test_server.py",
    ),
    Bug(
        Promise.FAILOVER,
        "an update counts as accepted though no replica has it",
        "worker/state/confirmation.py",
        "if have < self.replicas:",
        "if have < 0:",
        "tests/test_failover.py",
    ),
    Bug(
        Promise.FAILOVER,
        "everybody sends at once on the new server",
        LUA + "failover.lua",
        "QUIET, FAR = 3e6",
        "QUIET, FAR = 0",
        SCHEDULES,
        seed=183,
    ),
    Bug(
        Promise.NEWEST,
        "a retry does not wait until the old call can no longer land",
        DELIVERY + "policy.py",
        "Retried(self.backoff(attempts, jitter) + hold, proven",
        "Retried(self.backoff(attempts, jitter), proven",
        "tests/delivery/test_policy.py tests/delivery/test_plan.py",
    ),
    Bug(
        Promise.NEWEST,
        "a worker goes on with a batch that it has lost",
        DELIVERY + "loop.py",
        '            case "lost":\n                return "fenced"\n            case "must wait"',
        '            case "lost":\n                claim.permit, claim.permit_used = permit, False\n                return None\n'
        '            case "must wait"',
        "tests/delivery/test_loop.py",
    ),
    Bug(
        Promise.QUOTA,
        "a slot that was missed is used all the same",
        "worker/ratelimit.py",
        "return self._clock.monotonic() <= permit.due + GRACE",
        "return True",
        "tests/test_ratelimit.py",
    ),
    Bug(
        Promise.QUOTA,
        "a permit from before a pause is used",
        LUA + "prelude.lua",
        "return epoch ~= '' and epoch ~= (redis.call('HGET', rate, 'epoch') or '0')",
        "return false",
        "tests/test_ratelimit.py tests/state/test_buffer.py",
    ),
    Bug(
        Promise.QUOTA,
        "the slot after a late call is used",
        "worker/ratelimit.py",
        "if self._clock.monotonic() > permit.due + LATE:",
        "if False:",
        "tests/test_ratelimit.py",
    ),
    Bug(
        Promise.SPEED,
        "slots are a tenth further apart than the quota needs",
        LUA + "reserve.lua",
        "local CLOSEST, MARGIN = 1.02, 0.005",
        "local CLOSEST, MARGIN = 1.1, 0.005",
        "tests/test_ratelimit.py",
    ),
    Bug(
        Promise.SPEED,
        "a worker returns to Celery after each batch",
        DELIVERY + "loop.py",
        "MOST_BATCHES, LONGEST_CARRY = 20, 10.0",
        "MOST_BATCHES, LONGEST_CARRY = 1, 10.0",
        "tests/delivery/test_loop.py",
    ),
    Bug(
        Promise.SPEED,
        "a batch takes half of the users that a call may have",
        DELIVERY + "loop.py",
        "batch = self._buffer.claim(ticket, self._batch_size,",
        "batch = self._buffer.claim(ticket, self._batch_size // 2,",
        "tests/delivery/test_loop.py",
    ),
    Bug(
        Promise.BAD_USER,
        "users in ErrorList count as delivered",
        DELIVERY + "plan.py",
        "if (error := errors.get(user.user)) is None:",
        "if (error := errors.get(user.user)) is None or True:",
        "tests/delivery/test_plan.py",
    ),
    Bug(
        Promise.BAD_USER,
        "the second half of a bisected batch is forgotten",
        DELIVERY + "plan.py",
        "return replace(plan.next(*halves), bisecting=True)",
        "return replace(plan.next(halves[0]), bisecting=True)",
        "tests/delivery/test_plan.py",
    ),
    Bug(
        Promise.BAD_USER,
        "a call that is refused because of one user is given up whole",
        DELIVERY + "plan.py",
        "    if len(part.users) > 1:\n        return Step(_bisected(plan, part))\n    return _give_up(Step(plan), {part.users[0].user: letter})",
        "    return _give_up(Step(plan), {user.user: letter for user in part.users})",
        "tests/delivery/test_plan.py",
    ),
    Bug(
        Promise.BAD_USER,
        "suspects are sent together with others",
        DELIVERY + "plan.py",
        "suspects = () if batch.probe else tuple(",
        "suspects = () if True else tuple(",
        "tests/delivery/test_plan.py",
    ),
    Bug(
        Promise.LINE,
        "everyone in a call being refused makes dead letters of all",
        DELIVERY + "plan.py",
        "    if len(refused) >= DEAD_IN_A_ROW:",
        "    if False:",
        "tests/delivery/test_plan.py",
    ),
    Bug(
        Promise.LINE,
        "an outage is never one",
        DELIVERY + "plan.py",
        "if plan.batch.probe or failures >= OUTAGE_AFTER:",
        "if plan.batch.probe:",
        "tests/delivery/test_plan.py",
    ),
    Bug(
        Promise.LINE,
        "names that are not set make dead letters",
        DELIVERY + "plan.py",
        "    if not unset:\n",
        "    if True:\n",
        "tests/delivery/test_plan.py",
    ),
    Bug(
        Promise.LEDGER,
        "a repair does not count what it could not find",
        LUA + "repair.lua",
        "redis.call('HSET', ledger, 'lost', whole(lost + off))",
        "local _ = 0",
        "tests/state",
    ),
    Bug(
        Promise.LEDGER,
        "a record that is set aside is not counted",
        LUA + "settle.lua",
        "    set_aside('flight', now, user, sent[i])\n    counts.quarantined = counts.quarantined + 1\n",
        "    set_aside('flight', now, user, sent[i])\n",
        "tests/state",
    ),
    Bug(
        Promise.CHECKED,
        "a user whose update is on its way is judged",
        READBACK + "crew.py",
        "if before[user].in_motion or after[user].in_motion or",
        "if",
        "tests/readback",
    ),
    Bug(
        Promise.CHECKED,
        "a user that was delivered while it was read is judged",
        READBACK + "audit.py",
        "if after.in_motion or after.mark != before.mark or judgement is None:",
        "if judgement is None:",
        "tests/readback",
    ),
    Bug(
        Promise.CHECKED,
        "applying a plan overwrites what is newer than the file",
        READBACK + "difference.py",
        "if found != change.old or newest.get(name, 0) > change.version:",
        "if found != change.old:",
        "tests/readback",
    ),
    Bug(
        Promise.CHECKED,
        "a value that was delivered and is not there counts as newer",
        READBACK + "difference.py",
        "elif newest > version and delivered != value:",
        "elif newest > version:",
        "tests/readback",
    ),
    Bug(
        Promise.CHECKED,
        "an audit reports who seems wrong at the first look",
        READBACK + "audit.py",
        "if not finding.is_wrong or marks.get(finding.user) == finding.mark:",
        "if True:",
        "tests/readback",
    ),
    Bug(
        Promise.LEAKS,
        "a refusal quotes the value",
        "worker/models.py",
        'raise InvalidUpdate(user, f"{what} is {size} bytes, at most {limit}")',
        'raise InvalidUpdate(user, f"{what} is {text}, at most {limit}")',
        "tests/test_models.py tests/test_producer.py",
    ),
    Bug(
        Promise.LEAKS,
        "a setting that is secret is shown",
        "worker/config.py",
        'return "***"',
        "return self._text",
        "tests/test_config.py",
    ),
    Bug(
        Promise.LEAKS,
        "Flower sees the arguments of messages",
        "worker/celery.py",
        'self._argsrepr, self._kwargsrepr = "(hidden)", "(hidden)"',
        "pass",
        "tests/test_end_to_end.py::test_no_secret_and_no_value_ever_leaks",
    ),
    Bug(
        Promise.UNSTOPPABLE,
        "a message that cannot be read ends the intake",
        "worker/intake/celery_queue.py",
        "            except Exception as error:\n                # A defect of ours",
        "            except KeyError as error:\n                # A defect of ours",
        "tests/intake/test_celery_queue.py",
    ),
    Bug(
        Promise.UNSTOPPABLE,
        "a message that Celery cannot read goes back to the queue",
        "worker/transport.py",
        "            self._keep_popped(error)\n            return True",
        "            raise",
        "tests/test_celery_border.py",
    ),
    Bug(
        Promise.UNSTOPPABLE,
        "a record is trusted to be well formed",
        LUA + "prelude.lua",
        "    if not finite(version) or version < 0 or version > 1e13 then\n      return nil\n    end\n",
        "",
        "tests/state/test_damage.py",
    ),
)


def of(proof: str) -> Mapping[str, Bug]:
    """The bugs that the model, or the schedules, plant and must find."""
    return {bug.what: bug for bug in BUGS if bug.found_by == proof}


def plant_in_scripts(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let scripts have a bug until the test ends. What several share is planted in each that has it."""
    as_written = scripts.as_written
    assert bug.right in (ROOT / bug.file).read_text(encoding="utf-8")

    def spoiled(name: str) -> str:
        text = as_written(name)
        return text.replace(bug.right, bug.wrong) if name == Path(bug.file).stem or bug.shared else text

    monkeypatch.setattr(scripts, "as_written", spoiled)


def _plants_itself(bug: Bug) -> bool:
    return bug.found_by in (MODEL, SCHEDULES)


def copy_of_sources(into: Path) -> None:
    """Everything that git knows of, as it is now."""
    named = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in named.splitlines():
        if (ROOT / name).is_file():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, into / name)


def plant(bug: Bug, into: Path) -> None:
    """Put a bug into a copy; raises `ValueError` if the text is not there."""
    file = into / bug.file
    text = file.read_text(encoding="utf-8")
    if bug.right not in text:
        raise ValueError(f"{bug.file} has no longer the text that is replaced: {bug.what}")
    file.write_text(text.replace(bug.right, bug.wrong), encoding="utf-8")


def is_found(bug: Bug) -> bool:
    """Whether the tests that must find a bug do."""
    runner = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    if _plants_itself(bug):
        return (
            subprocess.run([*runner, f"{bug.found_by}[{bug.what}]"], cwd=ROOT, capture_output=True).returncode
            == 0
        )
    with tempfile.TemporaryDirectory() as directory:
        copy_of_sources(Path(directory))
        plant(bug, Path(directory))
        environ = {**os.environ, "PYTHONPATH": directory, "FAST_TESTS": "1"}
        # Without those that need real time, unless there are no others.
        for chosen in ("not slow", "slow"):
            command = [*runner, "-m", chosen, *bug.found_by.split()]
            done = subprocess.run(command, cwd=directory, env=environ, capture_output=True, text=True)
            if done.returncode != NO_TESTS:
                break
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{bug.what}: the tests did not run\n{done.stdout[-2000:]}")
    return done.returncode == 1


def table() -> str:
    """All bugs by promise, in Markdown."""
    lines = ["| promise | bug | found by |", "|---|---|---|"]
    for promise in Promise:
        for number, bug in enumerate(bug for bug in BUGS if bug.promise is promise):
            found_by = {MODEL: "the model", SCHEDULES: "schedules"}.get(bug.found_by)
            tests = ", ".join(f"`{name.removeprefix('tests/')}`" for name in bug.found_by.split())
            lines.append(f"| {'' if number else f'**{promise}**'} | {bug.what} | {found_by or tests} |")
    return "\n".join(lines)


def main(words: list[str]) -> int:
    """Plant all bugs, or those with these words in their names, one after the other; returns how many survived."""
    survived = 0
    bugs = [bug for bug in BUGS if not words or any(word in bug.what for word in words)]
    for bug in sorted(bugs, key=lambda bug: list(Promise).index(bug.promise)):
        began = time.monotonic()
        found = is_found(bug)
        survived += not found
        print(
            f"{'found' if found else 'SURVIVED':9}{time.monotonic() - began:5.1f} s  {bug.promise}: {bug.what}",
            flush=True,
        )
    print(f"\n{len(bugs)} bugs planted, {len(bugs) - survived} found, {survived} survived")
    return survived


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
