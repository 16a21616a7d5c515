"""Whole files: every format, every refusal, and every way to be interrupted, with nothing lost."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ManualClock, new_keys
from tests.state.test_dead_letters import Case
from worker.config import Settings
from worker.errors import CannotImport
from worker.intake import importer
from worker.intake.hyperloglog import HyperLogLog
from worker.intake.import_progress import ImportJournal, ImportOptions, Progress
from worker.intake.import_source import MAX_LINE, Line, Source, Unreadable, _rows
from worker.intake.importer import Importer, ImportStatus
from worker.models import Update
from worker.producer import Producer
from worker.sandbox.redis_server import EmbeddedServer
from worker.state.attribute_names import AttributeNames
from worker.state.buffer import MAX_UPDATES_PER_ADD, Added, Buffer
from worker.state.dead_letters import as_updates
from worker.state.import_pauses import ImportPauses
from worker.state.keys import Keys
from worker.state.scripts import text

#: Times of events, ms.
OLD, NEW = 1_700_000_000_000, 1_750_000_000_000

ANN, BOB = {"user": "ann", "attrs": {"city": "Paris"}}, {"user": "bob", "attrs": {"city": "Oslo"}}


@pytest.fixture
def settings(server: EmbeddedServer, keys: Keys) -> Settings:
    return settings_of(server, keys)


def settings_of(server: EmbeddedServer, keys: Keys, **environ: str) -> Settings:
    app = {"IMATTR_REDIS_URL": server.url, "IMATTR_SDKAPPID": str(keys.sdkappid)}
    return Settings.from_env(app | environ, "producer")


def json_lines(*updates: object) -> bytes:
    return "".join(json.dumps(update, ensure_ascii=False) + "\n" for update in updates).encode()


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def values(client: redis.Redis, keys: Keys) -> dict[str, dict[str, Any]]:
    """User -> attribute -> value, of all that is pending."""
    return {
        user: {name: pair[0] for name, pair in attrs.items()} for user, attrs in known(client, keys).items()
    }


def known(client: redis.Redis, keys: Keys) -> dict[str, dict[str, list[Any]]]:
    """User -> attribute -> [value, version], of all that is pending."""
    return {text(user): json.loads(packed)["a"] for user, packed in client.hgetall(keys.pending).items()}


def refusals(path: Path) -> list[tuple[int, str, str]]:
    return [tuple(json.loads(line).values()) for line in path.read_text().splitlines()]


def read(path: Path, **options: Any) -> list[object]:
    """What is in the file: updates, and the line and rule of what is none."""
    with Source(path, **options) as source:
        return [
            (record.line, record.found.rule) if isinstance(record.found, Unreadable) else record.found
            for record in source.records()
            if record.found is not None
        ]


# Formats.

JSONL = json_lines(
    {"user": "ann", "attrs": {"city": "Paris, France", "motto": 'a "b"\nc'}},
    {"user": "bob", "attrs": {"city": "東京"}, "occurred_at": OLD},
)
CSV = (f'city,user,occurred_at,motto\r\n"Paris, France",ann,,"a ""b""\nc"\r\n東京,bob,{OLD},\r\n').encode()
BOTH = {"ann": {"city": "Paris, France", "motto": 'a "b"\nc'}, "bob": {"city": "東京"}}


@pytest.mark.parametrize("content", [JSONL, CSV, codecs.BOM_UTF8 + JSONL, codecs.BOM_UTF8 + CSV])
@pytest.mark.parametrize(
    "pack", [bytes, gzip.compress, lambda text: gzip.compress(text[:9]) + gzip.compress(text[9:])]
)
def test_a_format_is_told_by_what_is_in_the_file(
    settings: Settings,
    client: redis.Redis,
    keys: Keys,
    tmp_path: Path,
    content: bytes,
    pack: Callable[[bytes], bytes],
) -> None:
    path = written(tmp_path / "users", pack(content))

    end = Importer(settings, ImportOptions(path=path)).run()

    assert (end.state, end.progress.accepted, end.progress.refused) == ("complete", 2, 0)
    assert values(client, keys) == BOTH
    assert known(client, keys)["bob"]["city"][1] == OLD
    assert client.zcard(keys.backfill) == 2
    assert list(tmp_path.iterdir()) == [path], "no progress is left, and nothing was refused"


@pytest.mark.parametrize("name", ["a.csv", "a.CSV", "a.csv.gz", "a.old.csv"])
def test_a_format_is_told_by_the_name(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, b'{"user",user\n1,ann\n')

    assert read(path) == [("ann", {'{"user"': "1"}, None)]


def test_a_format_can_be_said(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", JSONL)

    with Source(path, format="jsonl") as source:
        assert source.format == "jsonl"
        assert len(list(source.records())) == 2


def test_the_user_column_may_have_another_name(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", b"id,city\nann,Paris\n")

    assert read(path, user_column="id") == [("ann", {"city": "Paris"}, None)]


def test_an_empty_file_is_no_mistake_unless_it_should_have_a_header(
    settings: Settings, tmp_path: Path
) -> None:
    assert (
        Importer(settings, ImportOptions(path=written(tmp_path / "a.jsonl", b""))).run().progress.lines == 0
    )
    with pytest.raises(CannotImport, match="has no header"):
        Importer(settings, ImportOptions(path=written(tmp_path / "a.csv", b""))).run()


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"id,city", "not a header with a column 'user'"),
        (b"user,city,city", "two columns of the header have the same name"),
        (b"user,,city", "attribute name '' must be 1 to 50 bytes"),
        (b"user," + b"x" * 51, "must be 1 to 50 bytes"),
        (",".join(["user", *"abcdefghijk"]).encode(), "11 attribute names, an app has at most 10"),
        (b"user,shoe", r"column 'shoe' is not one of the app's attributes \(city, level\)"),
        (b"user,\xff", "the header cannot be read: the line is not UTF-8"),
        (b'user,"city', "the header cannot be read: the line is not CSV"),
    ],
)
def test_a_header_that_fits_nothing_is_told_at_once(tmp_path: Path, header: bytes, words: str) -> None:
    path = written(tmp_path / "a.csv", header + b"\nann,Paris\n")

    with pytest.raises(CannotImport, match=words):
        Source(path, names=frozenset({"city", "level"}) if b"shoe" in header else frozenset())


# Refusals.


def test_lines_of_json_that_are_no_updates_are_refused_alone(tmp_path: Path) -> None:
    shape = 'the line is not {"user": ..., "attrs": {...}}, with "occurred_at" if known and nothing else'
    bad = {
        b"nonsense": "the line is not JSON",
        b"[" * 100_000: "the line is not JSON",
        b'{"user": "a", "attrs": {"a": ' + b"1" * 5000 + b"}}": "the line is not JSON",
        b'{"user": "ann", "attrs": {"city": "Par': "the line is not JSON",
        b"[1]": shape,
        b"null": shape,
        b'{"user": "ann", "city": "Paris"}': shape,
        b'{"user": "ann"}': shape,
        b'{"user": "ann", "attrs": {"a": "b"}, "at": 1}': shape,
        b'{"user": "ann", "attrs": {"a": "\xff"}}': "the line is not UTF-8",
        b"x" * (MAX_LINE + 1): "the line is longer than 1,000,000 bytes",
        b"x" * (3 * MAX_LINE): "the line is longer than 1,000,000 bytes",
        b'{"user": 7, "city": "Paris"}': "user id must be a string, got int",
    }
    good = json_lines(ANN).strip()
    path = written(tmp_path / "a.jsonl", b"".join(line + b"\n\n" + good + b"\r\n" for line in bad))

    found = read(path)

    assert found[0::2] == [(1 + 3 * place, rule) for place, rule in enumerate(bad.values())]
    assert found[1::2] == [("ann", {"city": "Paris"}, None)] * len(bad)


def test_rows_of_csv_that_are_no_updates_are_refused_alone(tmp_path: Path) -> None:
    no_csv = "the line is not CSV: a quote is out of place or never closed, or a cell is too long"
    bad = {
        "ann,Paris,Gold,more": "4 cells, the header has 3",
        "ann,Paris": "2 cells, the header has 3",
        'ann,"Paris"x,Gold': no_csv,
        'ann,"Paris,Gold': no_csv,
        f"ann,{'x' * 200_000},Gold": no_csv,
        f"ann,{'x,' * MAX_LINE},Gold": "the line is longer than 1,000,000 bytes",
        "ann,\udcff,Gold": "the line is not UTF-8",
        'ann,"Pa\nris",Gold,more': "4 cells, the header has 3",
    }
    good = 'bob,"Pa\nris",5" pipe\n'
    text = "user,city,size\n" + "".join(f"{line}\n\n{good}" for line in bad)
    path = written(tmp_path / "a.csv", text.encode(errors="surrogateescape"))

    found = read(path)

    assert found[0::2] == [(2 + 4 * place, rule) for place, rule in enumerate(bad.values())]
    assert found[1::2] == [("bob", {"city": "Pa\nris", "size": '5" pipe'}, None)] * len(bad)


def test_a_quote_that_is_never_closed_costs_its_own_line_only(tmp_path: Path) -> None:
    rows = [f"user{number},Paris\n" for number in range(10_000)]
    rows[0] = rows[5000] = rows[-1] = 'ann,"Paris\n'
    path = written(tmp_path / "a.csv", "".join(["user,city\n", *rows]).encode())

    found = read(path)

    assert len(found) == 10_000
    assert [place for place, one in enumerate(found) if isinstance(one, tuple) and len(one) == 2] == [
        0,
        5000,
        9999,
    ]


def test_a_row_that_never_ends_is_not_kept() -> None:
    taken = 0

    def lines() -> Iterator[Line]:
        nonlocal taken
        for taken in range(1, 1_000_000):
            # Each line closes the cell of the one before, and opens another.
            yield Line(taken, b'ann,"x\n' if taken == 1 else b'","x\n', taken)

    assert isinstance(next(_rows(lines(), ",")).cells, Unreadable)
    assert taken < 20_000


def test_refused_lines_are_listed_with_line_user_and_rule_and_never_a_value(
    settings: Settings, client: redis.Redis, keys: Keys, tmp_path: Path
) -> None:
    AttributeNames(client, keys, ManualClock()).set(["city"])
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        json_lines(ANN, {"user": "", "attrs": {"city": "hidden"}})
        + b"\nhidden\n"
        + json_lines(
            {"user": "bob", "attrs": {"city": "hidden" * 9}}, {"user": "cid", "attrs": {"shoe": "hidden"}}
        )
        + json_lines({"user": "dan", "attrs": {"city": "x"}, "occurred_at": "hidden"}, BOB)
    )

    end = Importer(settings, ImportOptions(path=path), size=2).run()

    assert (end.progress.lines, end.progress.accepted, end.progress.refused) == (7, 2, 5)
    assert refusals(tmp_path / "a.jsonl.refused.jsonl") == [
        (2, "''", "user id is empty"),
        (4, "?", "the line is not JSON"),
        (5, "bob", "the value of 'city' is 54 bytes, at most 50"),
        (6, "cid", "attribute 'shoe' is not one of the app's (city)"),
        (7, "dan", "occurred_at is not an ISO 8601 time"),
    ]
    assert "hidden" not in (tmp_path / "a.jsonl.refused.jsonl").read_text()


def test_a_list_of_an_earlier_import_does_not_stay(settings: Settings, tmp_path: Path) -> None:
    path, listed = written(tmp_path / "a.jsonl", b"x\n"), tmp_path / "listed"
    job = ImportOptions(path=path, refused=listed)
    Importer(settings, job).run()
    Importer(settings, job).run()
    assert len(refusals(listed)) == 1

    path.write_bytes(json_lines(ANN))
    Importer(settings, job).run()
    assert not listed.exists()


def test_the_list_cannot_go_into_the_file_itself(settings: Settings, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", JSONL)

    with pytest.raises(CannotImport, match="into the imported file itself"):
        Importer(settings, ImportOptions(path=path, refused=path)).run()
    assert path.read_bytes() == JSONL


def test_a_list_that_cannot_be_written_is_told(settings: Settings, tmp_path: Path) -> None:
    job = ImportOptions(path=written(tmp_path / "a.jsonl", b"x\n"), refused=tmp_path / "nowhere" / "list")

    with pytest.raises(CannotImport, match="nowhere/list cannot be written: No such file or directory"):
        Importer(settings, job).run()


def test_a_packed_file_that_is_cut_off_is_told_and_what_came_before_is_accepted(
    settings: Settings, client: redis.Redis, keys: Keys, tmp_path: Path
) -> None:
    lines = b"".join(
        json_lines({"user": f"u{os.urandom(8).hex()}", "attrs": {"a": "b"}}) for _ in range(30_000)
    )
    path = written(tmp_path / "a.gz", gzip.compress(lines, 1)[:-1000])

    with pytest.raises(CannotImport, match="damaged or cut off"):
        Importer(settings, ImportOptions(path=path)).run()

    assert (
        client.hlen(keys.pending)
        == json.loads((tmp_path / "a.gz.import-progress").read_text())["progress"]["accepted"]
        > 0
    )


# Time.


def test_a_file_never_replaces_what_happened_after_it(
    settings: Settings, server: EmbeddedServer, client: redis.Redis, keys: Keys, tmp_path: Path
) -> None:
    producer = Producer(server.url, keys.sdkappid)
    producer.set("ann", {"city": "Rome"}, NEW)
    producer.set("bob", {"city": "Bern"}, OLD - 1)
    updates = [ANN, BOB, {"user": "ann", "attrs": {"city": "Bonn"}, "occurred_at": NEW + 1}]
    path = written(tmp_path / "a.jsonl", json_lines(*updates))

    end = Importer(settings, ImportOptions(path=path, as_of_ms=OLD)).run()

    assert values(client, keys) == {"ann": {"city": "Bonn"}, "bob": {"city": "Oslo"}}
    assert (end.progress.accepted, end.progress.coalesced, end.progress.stale) == (3, 2, 1)


def test_what_happens_while_a_file_is_read_wins_however_often_that_is_interrupted(
    settings: Settings, server: EmbeddedServer, client: redis.Redis, keys: Keys, tmp_path: Path
) -> None:
    path = written(tmp_path / "a.jsonl", json_lines(ANN, BOB))
    assert Importer(settings, ImportOptions(path=path), size=1, stopped=after(1)).run().state == "stopped"
    Producer(server.url, keys.sdkappid).set_many([("ann", {"city": "Rome"}), ("bob", {"city": "Bern"})])

    assert Importer(settings, ImportOptions(path=path)).run().state == "complete"

    assert values(client, keys) == {"ann": {"city": "Rome"}, "bob": {"city": "Bern"}}


def test_a_file_of_the_future_is_a_mistake(settings: Settings, tmp_path: Path) -> None:
    job = ImportOptions(path=written(tmp_path / "a.jsonl", JSONL), as_of_ms=9_000_000_000_000)

    with pytest.raises(CannotImport, match="--as-of: occurred_at is further ahead of Redis' clock"):
        Importer(settings, job).run()


def test_the_lane_can_be_chosen(settings: Settings, client: redis.Redis, keys: Keys, tmp_path: Path) -> None:
    Importer(settings, ImportOptions(path=written(tmp_path / "a.jsonl", JSONL), lane="live")).run()

    assert (client.zcard(keys.live), client.zcard(keys.backfill)) == (2, 0)


def test_null_removes_an_attribute(
    settings: Settings, client: redis.Redis, keys: Keys, tmp_path: Path
) -> None:
    path = written(tmp_path / "a.jsonl", json_lines({"user": "ann", "attrs": {"city": None}}))

    assert Importer(settings, ImportOptions(path=path)).run().progress.accepted == 1
    assert not values(client, keys)["ann"]["city"]


def test_exported_dead_letters_can_be_read_back(
    settings: Settings, client: redis.Redis, keys: Keys, tmp_path: Path
) -> None:
    case = Case(client, keys)
    case.dead_letter("ann", "bob", city="Paris", level="Gold")
    exported = [update for letter in case.dead.find() for update in as_updates(letter)]

    end = Importer(
        settings, ImportOptions(path=written(tmp_path / "letters.jsonl", json_lines(*exported)))
    ).run()

    assert end.progress.accepted == 2
    assert values(client, keys) == {user: {"city": "Paris", "level": "Gold"} for user in ("ann", "bob")}
    assert case.dead.count() == 0


# Interruptions.


def after(chunks: int) -> Callable[[], bool]:
    """Says that it is time to stop after so many chunks."""
    asked = iter(range(chunks))
    return lambda: next(asked, None) is None


some_updates = st.lists(
    st.fixed_dictionaries(
        {
            "user": st.sampled_from(["ann", "bob", "cid", ""]),
            "attrs": st.dictionaries(
                st.sampled_from("ab"), st.sampled_from(["1", "2", "x" * 51]), min_size=1
            ),
            "occurred_at": st.sampled_from([None, OLD, OLD + 1, NEW]),
        }
    ),
    max_size=12,
)


def as_csv(*updates: Any) -> bytes:
    rows = [(one["user"], *map(one["attrs"].get, "ab"), one["occurred_at"]) for one in updates]
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    return "".join(",".join(row) + "\n" for row in [["user", "a", "b", "occurred_at"], *cells]).encode()


#: Format -> how a file is made, and how many lines stand before the first update.
WRITERS: dict[str, tuple[Callable[..., bytes], int]] = {
    "jsonl": (json_lines, 0),
    "csv": (as_csv, 1),
    "jsonl.gz": (lambda *updates: gzip.compress(json_lines(*updates)), 0),
    "csv.gz": (lambda *updates: gzip.compress(as_csv(*updates)), 1),
}


class Imported:
    """A file of updates, imported in as many runs as it takes, and what must come of it."""

    def __init__(
        self, server: EmbeddedServer, directory: str, updates: list[Any], kind: str, size: int
    ) -> None:
        self.keys, self.size, self.updates = new_keys(), size, updates
        self.settings = settings_of(server, self.keys)
        write, self.before = WRITERS[kind]
        self.job = ImportOptions(
            path=written(Path(directory) / f"users.{kind}", write(*updates)), as_of_ms=NEW - 1
        )

    def run(self, stopped: Callable[[], bool] = lambda: False) -> ImportStatus:
        return Importer(self.settings, self.job, stopped=stopped, size=self.size).run()

    def check(self, client: redis.Redis, progress: Progress) -> None:
        """Each line has had its effect and is counted once."""
        expected: dict[str, dict[str, list[Any]]] = {}
        refused = []
        for line, update in enumerate(self.updates, self.before + 1):
            if update["user"] == "" or any(len(value) > 50 for value in update["attrs"].values()):
                refused.append(line)
                continue
            mine, version = expected.setdefault(update["user"], {}), update["occurred_at"] or NEW - 1
            for name, value in update["attrs"].items():
                if name not in mine or version >= mine[name][1]:
                    mine[name] = [value, version]
        assert known(client, self.keys) == expected
        assert (progress.lines, progress.refused) == (len(self.updates), len(refused))
        listed = self.job.refused_path
        assert [line for line, _, _ in refusals(listed)] == refused if refused else not listed.exists()
        assert not self.job.progress_path.exists()
        assert Buffer(client, self.keys).snapshot().balanced


@given(
    some_updates, st.lists(st.integers(0, 4), max_size=4), st.sampled_from(list(WRITERS)), st.integers(1, 4)
)
def test_wherever_it_is_stopped_it_goes_on_there(
    server: EmbeddedServer, client: redis.Redis, updates: list[Any], stops: list[int], kind: str, size: int
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        case = Imported(server, directory, updates, kind, size)
        for chunks in stops:
            if case.run(after(chunks)).state == "complete":
                # Begun anew, it would be offered again.
                return
            assert case.job.progress_path.exists()

        end = case.run()

        case.check(client, end.progress)
        assert Buffer(client, case.keys).snapshot().ledger["accepted"] == end.progress.accepted, "none twice"


#: Steps of a chunk, in their order: offered, accepted, refusals listed, progress written.
STEPS = ("before add", "after add", "before write", "after write")


@given(
    some_updates, st.integers(0, 5), st.sampled_from(STEPS), st.sampled_from(list(WRITERS)), st.integers(1, 4)
)
def test_wherever_it_is_killed_nothing_is_lost_and_nothing_is_counted_twice(
    server: EmbeddedServer,
    client: redis.Redis,
    updates: list[Any],
    chunk: int,
    step: str,
    kind: str,
    size: int,
) -> None:
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        case = Imported(server, directory, updates, kind, size)
        where = (Producer, "add") if "add" in step else (ImportJournal, "_write")
        # The journal is written once before the first chunk.
        killed = Killing(patch, *where, calls=chunk + ("write" in step), late="after" in step)
        try:
            end = case.run()
        except Kill:
            killed.heal()
            end = case.run()

        case.check(client, end.progress)


class Kill(BaseException):
    """Ends a run where nobody expects it."""


class Killing:
    """Makes one method raise `Kill` after so many calls, before or after it has done its work."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: type, name: str, *, calls: int, late: bool) -> None:
        real, left = getattr(owner, name), iter(range(calls))
        self._healed = False

        def method(*args: Any, **kwargs: Any) -> Any:
            dying = not self._healed and next(left, None) is None
            if dying and not late:
                raise Kill
            result = real(*args, **kwargs)
            if dying:
                raise Kill
            return result

        patch.setattr(owner, name, method)

    def heal(self) -> None:
        self._healed = True


def test_a_refusal_that_was_listed_right_before_a_kill_is_listed_once(
    settings: Settings, tmp_path: Path
) -> None:
    job = ImportOptions(path=written(tmp_path / "a.jsonl", b"x\ny\nz\n"))
    with pytest.MonkeyPatch.context() as patch:
        Killing(patch, ImportJournal, "_write", calls=2, late=False)
        with pytest.raises(Kill):
            Importer(settings, job, size=1).run()
    assert len(refusals(job.refused_path)) == 2

    Importer(settings, job).run()

    assert [line for line, _, _ in refusals(job.refused_path)] == [1, 2, 3]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_it_goes_on_after_a_line_that_was_too_long(
    settings: Settings, client: redis.Redis, keys: Keys, tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    content = json_lines(ANN) + b"x" * 3 * MAX_LINE + b"\n" + json_lines(BOB)
    job = ImportOptions(path=written(tmp_path / "a", pack(content)))
    Importer(settings, job, size=1, stopped=after(2)).run()

    end = Importer(settings, job).run()

    assert (end.progress.accepted, end.progress.refused) == (2, 1)
    assert values(client, keys).keys() == {"ann", "bob"}


def test_a_run_that_goes_on_says_where(settings: Settings, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", json_lines(*[ANN] * 10))
    job = ImportOptions(path=path)
    Importer(settings, job, size=3, stopped=after(2)).run()
    seen: list[ImportStatus] = []

    end = Importer(settings, job, size=3, show=seen.append).run()

    assert [(view.state, view.resumed_after, view.progress.lines) for view in seen] == [
        ("accepting", 6, 10),
        ("accepting", 6, 10),
    ]
    assert (end.state, end.resumed_after, end.progress.line) == ("complete", 6, 10)


def test_it_goes_on_only_with_what_is_the_same(
    server: EmbeddedServer, settings: Settings, client: redis.Redis, keys: Keys, tmp_path: Path
) -> None:
    path = written(tmp_path / "a.csv", b"user,city,x\nann,Paris,ann\nbob,Oslo,bob\n")
    job = ImportOptions(path=path, as_of_ms=OLD)
    Importer(settings, job, size=1, stopped=after(1)).run()

    for other, what in (
        (replace(job, lane="live"), "lane"),
        (replace(job, user_column="x"), "user column"),
        (replace(job, as_of_ms=OLD + 1), "as-of time"),
        (replace(job, refused=tmp_path / "x"), "file for refused lines"),
    ):
        with pytest.raises(
            CannotImport, match=rf"stopped after line 2; to resume it, the {what} must be the same"
        ):
            Importer(settings, other).run()
    with pytest.raises(CannotImport, match="the app must be the same"):
        Importer(replace(settings, sdkappid=new_keys().sdkappid), job).run()
    with path.open("ab") as file:
        file.write(b"cid,Rome,cid\n")
    with pytest.raises(CannotImport, match=rf"the file must be the same .* --restart, with --as-of {OLD}"):
        Importer(settings, job).run()

    assert Importer(settings, replace(job, restart=True)).run().progress.lines == 3
    assert len(values(client, keys)) == 3


def test_a_damaged_progress_is_told(settings: Settings, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", JSONL)
    for damage in (b"", b"[]", b"{}", b'{"import": {}, "progress": {"x": 1}}', b"\xff"):
        written(tmp_path / "a.jsonl.import-progress", damage)
        with pytest.raises(CannotImport, match="import-progress is damaged; --restart"):
            Importer(settings, ImportOptions(path=path)).run()

    assert Importer(settings, ImportOptions(path=path, restart=True)).run().state == "complete"


def test_a_file_is_imported_by_one_at_a_time(settings: Settings, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", JSONL)
    with Source(path) as other:
        other.lock()
        with pytest.raises(CannotImport, match="another import of this file is running"):
            Importer(settings, ImportOptions(path=path)).run()

    assert Importer(settings, ImportOptions(path=path)).run().state == "complete"


@pytest.mark.parametrize("half", [b"", json_lines(BOB)[:-8]])
def test_a_pipe_can_be_left_while_it_has_nothing_to_say(
    settings: Settings,
    client: redis.Redis,
    keys: Keys,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    half: bytes,
) -> None:
    monkeypatch.chdir(tmp_path)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    stop = threading.Event()
    seen: list[ImportStatus] = []

    def show(view: ImportStatus) -> None:
        seen.append(view)
        stop.set()

    # Open for writing all the time: it does not end.
    descriptor = os.open(pipe, os.O_RDWR)
    os.write(descriptor, b"x\n" + half)
    try:
        end = Importer(
            settings, ImportOptions(path=pipe, format="jsonl"), size=1, stopped=stop.is_set, show=show
        ).run()
    finally:
        os.close(descriptor)

    assert (end.state, end.progress.line, end.share, end.eta) == ("stopped", 1, None, None)
    assert values(client, keys) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["pipe", "imattr-import.refused.jsonl"]


# Back-pressure.


class Worker(ManualClock):
    """A clock on which a user is delivered whenever somebody waits."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        super().__init__()
        self.client, self.keys = client, keys
        self.delivered: list[tuple[str, dict[str, Any]]] = []

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        self.deliver()

    def deliver(self) -> None:
        oldest: Any = self.client.zrange(self.keys.backfill, 0, 0)
        user = text(oldest[0])
        self.delivered.append((user, values(self.client, self.keys)[user]))
        self.client.zrem(self.keys.backfill, user)
        self.client.hdel(self.keys.pending, user)


def test_it_waits_while_there_is_no_room_and_keeps_the_order(
    server: EmbeddedServer, client: redis.Redis, keys: Keys, tmp_path: Path
) -> None:
    given_ = [
        ("ann", "1"),
        ("bob", "1"),
        ("cid", "1"),
        ("ann", "2"),
        ("cid", "2"),
        ("dan", "1"),
        ("cid", "3"),
    ]
    path = written(tmp_path / "a.jsonl", json_lines(*({"user": u, "attrs": {"a": v}} for u, v in given_)))
    settings = settings_of(server, keys, IMATTR_MAX_PENDING="2")
    worker, seen = Worker(client, keys), list[ImportStatus]()

    end = Importer(settings, ImportOptions(path=path), clock=worker, show=seen.append).run()

    assert end.progress.accepted == len(given_)
    assert end.progress.refused == 0
    assert "waiting for room" in [view.state for view in seen]
    assert worker.slept
    assert max(client.hlen(keys.pending), 2) == 2
    last = dict(worker.delivered) | values(client, keys)
    assert last == {"ann": {"a": "2"}, "bob": {"a": "1"}, "cid": {"a": "3"}, "dan": {"a": "1"}}


def test_it_can_be_stopped_while_there_is_no_room(
    server: EmbeddedServer, client: redis.Redis, keys: Keys, tmp_path: Path
) -> None:
    path = written(tmp_path / "a.jsonl", json_lines(ANN, BOB))
    job, full = ImportOptions(path=path), settings_of(server, keys, IMATTR_MAX_PENDING="1")

    end = Importer(full, job, clock=ManualClock(), stopped=after(2)).run()
    assert (end.state, end.progress.lines) == ("stopped", 0)
    end = Importer(settings_of(server, keys), job).run()

    assert (end.state, end.progress.lines) == ("complete", 2)
    assert values(client, keys) == {"ann": {"city": "Paris"}, "bob": {"city": "Oslo"}}


def test_it_waits_while_the_memory_of_redis_is_full(
    settings: Settings, client: redis.Redis, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, clock = Producer.add, ManualClock()

    def add(self: Producer, updates: list[Update], **options: Any) -> Added:
        if not clock.slept:
            raise redis.exceptions.OutOfMemoryError("command not allowed when used memory > 'maxmemory'")
        return real(self, updates, **options)

    monkeypatch.setattr(Producer, "add", add)

    end = Importer(settings, ImportOptions(path=written(tmp_path / "a.jsonl", JSONL)), clock=clock).run()

    assert (end.state, end.progress.accepted, len(clock.slept)) == ("complete", 2, 1)
    assert values(client, keys) == BOTH


# Rehearsal.


def test_a_rehearsal_says_what_it_would_take_and_writes_nothing(
    settings: Settings, client: redis.Redis, keys: Keys, tmp_path: Path
) -> None:
    lines = [{"user": f"user{number % 250}", "attrs": {"city": "Paris"}} for number in range(1000)]
    path = written(tmp_path / "a.jsonl", json_lines(*lines) + b"x\n" * 7)
    before = set(client.scan_iter(count=1000))

    estimate = Importer(settings, ImportOptions(path=path)).rehearse()

    assert (estimate.state, estimate.lines, estimate.refused) == ("complete", 1007, 7)
    assert estimate.users == pytest.approx(250, abs=2)
    assert estimate.calls == 3
    assert estimate.seconds == pytest.approx(3 * 1.02 / 100)
    assert [refusal.line for refusal in estimate.refusals] == [1001, 1002, 1003, 1004, 1005]
    assert list(tmp_path.iterdir()) == [path]
    assert set(client.scan_iter(count=1000)) == before


@pytest.mark.parametrize("count", [0, 1, 1000, 100_000, 300_000])
def test_users_are_counted_to_about_a_percent(count: int) -> None:
    users = HyperLogLog()
    for _ in range(2):
        users.add(f"user{number}" for number in range(count))

    assert users.count() == pytest.approx(count, rel=0.015)


# Size.


def test_memory_does_not_grow_with_the_file(settings: Settings, tmp_path: Path) -> None:
    update = json_lines({"user": "ann", "attrs": {f"name{place}": "x" * 40 for place in range(10)}})
    path = written(tmp_path / "a.jsonl", update * 40_000)
    sizes: list[int] = []

    def show(view: ImportStatus) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        sizes.append(pages * resource.getpagesize())

    Importer(settings, ImportOptions(path=path), show=show).run()

    assert path.stat().st_size > 20_000_000
    assert max(sizes) - sizes[5] < 4_000_000


# A real process.


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        threading.Event().wait(0.01)


class Process:
    """`imattr import`, as people run it."""

    def __init__(self, settings: Settings, directory: Path) -> None:
        self.directory = directory
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith("IMATTR_")}
        self.environ |= {
            "IMATTR_REDIS_URL": settings.redis_url.reveal(),
            "IMATTR_SDKAPPID": str(settings.sdkappid),
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }

    def start(self, *arguments: str, stdin: int | None = None) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "worker.cli", "import", *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=self.directory, env=self.environ, stdin=stdin, stdout=pipe, stderr=pipe
        )


@pytest.fixture
def process(settings: Settings, tmp_path: Path) -> Process:
    return Process(settings, tmp_path)


@pytest.mark.slow  # real processes, which are killed
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_process_that_ends_in_the_middle_loses_nothing(
    process: Process, client: redis.Redis, keys: Keys, tmp_path: Path, how: signal.Signals
) -> None:
    count = 60_000
    lines = (json.dumps({"user": f"user{number:06}", "attrs": {"n": str(number)}}) for number in range(count))
    path = written(tmp_path / "a.jsonl", "\n".join(lines).encode())
    running = process.start("a.jsonl")
    wait_until(lambda: client.hlen(keys.pending) >= 3000)

    running.send_signal(how)
    output, errors = running.communicate(timeout=60)

    accepted = client.hlen(keys.pending)
    progress = json.loads((tmp_path / "a.jsonl.import-progress").read_text())["progress"]
    assert accepted < count
    assert 0 <= accepted - progress["accepted"] <= (MAX_UPDATES_PER_ADD if how == signal.SIGKILL else 0)
    if how != signal.SIGKILL:
        assert running.returncode == 130
        assert b"the same command resumes there" in errors
    output, errors = (again := process.start("a.jsonl", "--json")).communicate(timeout=60)
    assert again.returncode == 0
    assert f"resuming after line {progress['line']:,}, where an earlier run ended".encode() in errors
    end = json.loads(output)
    assert (end["state"], end["resumed_after"], end["accepted"]) == ("complete", progress["line"], count)
    assert client.hlen(keys.pending) == client.zcard(keys.backfill) == count
    assert all(int(attrs["n"]) == int(user[4:]) for user, attrs in values(client, keys).items())
    assert [*tmp_path.iterdir()] == [path]


def test_stdin_may_be_packed_and_refused_lines_stand_in_the_directory(
    process: Process, client: redis.Redis, keys: Keys, tmp_path: Path
) -> None:
    running = process.start("-", "--as-of", "2024-01-01T00:00:00Z", stdin=subprocess.PIPE)

    output, _ = running.communicate(gzip.compress(CSV + b'"x\ny"\n'), timeout=60)

    assert running.returncode == 3
    assert b"listed in imattr-import.refused.jsonl" in output
    assert values(client, keys) == BOTH
    assert known(client, keys)["ann"]["city"][1] == 1_704_067_200_000
    assert refusals(tmp_path / "imattr-import.refused.jsonl") == [(5, "?", "1 cells, the header has 4")]


def test_an_import_waits_while_somebody_wants_it_to(
    client: redis.Redis, settings: Settings, keys: Keys, tmp_path: Path, clock: ManualClock
) -> None:
    file = written(tmp_path / "users.jsonl", json_lines(ANN, BOB, {"user": "", "attrs": {}}))
    options = ImportOptions(path=file)
    pauses, seen = ImportPauses(client, keys), list[ImportStatus]()
    Buffer(client, keys).begin_import(options.name, 1)
    pauses.pause(options.name, "later", by="ann")

    def show(status: ImportStatus) -> None:
        seen.append(status)
        if len(seen) == 3:
            pauses.resume(options.name, by="bob")

    done = Importer(settings, options, show=show, clock=clock, size=1).run()

    assert [(status.state, status.pause and status.pause.by) for status in seen[:4]] == [
        ("paused", "ann"),
        ("paused", "ann"),
        ("paused", "ann"),
        ("accepting", None),
    ]
    assert clock.slept == [1.0, 1.0, 1.0]
    assert (done.state, done.progress.accepted) == ("complete", 2)


def test_an_import_that_is_paused_can_be_stopped_and_stays_paused(
    client: redis.Redis, settings: Settings, keys: Keys, tmp_path: Path, clock: ManualClock
) -> None:
    options = ImportOptions(path=written(tmp_path / "users.jsonl", json_lines(ANN, BOB)))
    pauses = ImportPauses(client, keys)
    Buffer(client, keys).begin_import(options.name, 1)
    pauses.pause(options.name, "later", by="ann")

    done = Importer(settings, options, stopped=lambda: len(clock.slept) > 1, clock=clock).run()

    assert (done.state, done.progress.accepted) == ("stopped", 0)
    assert pauses.find(options.name)


def test_the_last_refused_lines_can_be_looked_at_while_the_import_runs(
    client: redis.Redis, settings: Settings, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = [{"user": f"u{n}", "attrs": {"city": "x" * 51}} for n in range(12)]
    options = ImportOptions(path=written(tmp_path / "users.jsonl", json_lines(*bad, ANN)))
    shown: list[Any] = []

    def show(_: ImportStatus) -> None:
        shown.append(client.hget(keys.import_progress, options.name))

    monkeypatch.setattr(importer, "TELL_EVERY", 0.0)
    Importer(settings, options, show=show, size=1).run()

    refusals = json.loads(shown[-1])["refusals"]
    assert [line for line, _, _ in refusals] == list(range(3, 13))
    assert refusals[-1][1:] == ["u11", "the value of 'city' is 51 bytes, at most 50"]
    assert "xxx" not in shown[-1].decode()
