"""What other programs do to a list of users: understood and said, or refused with what to do."""

from __future__ import annotations

import bz2
import json
import lzma
import zipfile
from pathlib import Path

import pytest
import redis

from worker.config import Secret, Settings
from worker.errors import CannotImport
from worker.intake.import_progress import ImportOptions
from worker.intake.import_source import RawUpdate, Source, Unreadable
from worker.intake.importer import Importer
from worker.sandbox.redis_server import EmbeddedServer
from worker.state.keys import Keys

GOOD = RawUpdate("u1", {"city": "Paris"})
OTHER = RawUpdate("u2", {"city": "Oslo"})


def read(
    tmp_path: Path, text: str | bytes, name: str = "a.csv", **options: str | None
) -> tuple[list[RawUpdate | Unreadable], list[str]]:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with Source(path, **options) as source:  # type: ignore[arg-type]
        found = [record.found for record in source.records() if record.found is not None]
        return found, source.notes


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("user,city\nu1,Paris\nuser,city\nu2,Oslo\n", "1 more header left out"),
        ("\ufeffuser,city\nu1,Paris\n\ufeffuser,city\nu2,Oslo\n", "1 more header left out"),
        ("user;city\nu1;Paris\nu2;Oslo\n", "separated by semicolons"),
        ("user\tcity\nu1\tParis\nu2\tOslo\n", "separated by tabs"),
        ("user|city\nu1|Paris\nu2|Oslo\n", "separated by vertical bars"),
        ('"user";"city"\n"u1";"Paris"\n"u2";"Oslo"\n', "separated by semicolons"),
        ("sep=;\nuser;city\nu1;Paris\nu2;Oslo\n", "separated by semicolons"),
        ("user,city\r\nu1,Paris\r\nu2,Oslo\r\n", ""),
        ("user,city,,\nu1,Paris,,\nu2,Oslo,,\n,,,\n", ""),
        ("user , city\nu1,Paris\n\nu2,Oslo", ""),
    ],
)
def test_what_is_meant_is_read_and_said(tmp_path: Path, text: str, note: str) -> None:
    found, notes = read(tmp_path, text)

    assert found == [GOOD, OTHER]
    assert notes == ([note] if note else [])


@pytest.mark.parametrize(
    ("text", "what_to_do"),
    [
        ("user,city\nu1,Paris\nuser,level\nu2,Gold\n", "one by one"),
        ("user,city,level\nu1,Paris,Gold\nlevel,user,city\nGold,u2,Oslo\n", "one by one"),
        ("user,city\ru1,Paris\ru2,Oslo\r", "tr"),
        ("user,city\nu1,Paris\n".encode("utf-16"), "iconv"),
        ("user,city\nu1,Paris\n".encode("utf-16-le"), "UTF-8"),
        ("User,city\nu1,Paris\n", "--user-column 'User'"),
        ("user_id,city\nu1,Paris\n", "--user-column 'user_id'"),
        (bz2.compress(b"user,city\n"), "bzip2"),
        (lzma.compress(b"user,city\n"), "xz"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "CSV"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_what_to_do(
    tmp_path: Path, text: str | bytes, what_to_do: str
) -> None:
    with pytest.raises(CannotImport, match=what_to_do):
        read(tmp_path, text)


def test_a_workbook_is_no_list(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.xlsx", "w") as book:
        book.writestr("xl/worksheets/sheet1.xml", "<worksheet/>")

    with pytest.raises(CannotImport, match="export the sheet as CSV"):
        Source(tmp_path / "a.xlsx")


@pytest.mark.parametrize(
    ("text", "what_to_do"),
    [
        ('[{"user": "u1", "attrs": {"city": "Paris"}}]', "jq -c"),
        ('[\n{"user": "u1", "attrs": {"city": "Paris"}}\n]\n', "jq -c"),
        ('\ufeff[{"user": "u1", "attrs": {"city": "Paris"}}]', "jq -c"),
        ('{\n  "user": "u1",\n  "attrs": {"city": "Paris"}\n}\n', "jq -c"),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt"])
def test_json_in_another_shape_is_refused_with_what_to_do(
    tmp_path: Path, name: str, text: str, what_to_do: str
) -> None:
    with pytest.raises(CannotImport, match=what_to_do):
        read(tmp_path, text, name)


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ('{"user": "u1", "user": "u2", "attrs": {"city": "Paris"}}', "twice"),
        ('{"user": "u1", "attrs": {"city": "Paris", "city": "Oslo"}}', "twice"),
        ('{"user": "u1", "attrs": {"city": "Paris"}},', "not JSON"),
        ('{"User": "u1", "attrs": {"city": "Paris"}}', "user id must be a string"),
    ],
)
def test_a_line_of_json_with_two_meanings_is_refused(tmp_path: Path, line: str, rule: str) -> None:
    good = json.dumps({"user": "u1", "attrs": {"city": "Paris"}})

    (refused, found), _ = read(tmp_path, f"{line}\n\ufeff{good}\n", "a.jsonl")

    assert isinstance(refused, Unreadable)
    assert rule in refused.rule
    assert found == GOOD


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ("1.23457E+11,Paris", "rounded"),
        ('"1,23457E+11",Paris', "rounded"),
        ("1001.0,Paris", "decimals"),
        ("'001,Paris", "mark for text"),
        ('"=""001""",Paris', "mark for text"),
        (" u1,Paris", "spaces"),
        ("u1, Paris", "spaces"),
        ("u1,Paris\xa0", "spaces"),
        ("u1,NULL", "--null"),
        ("u1,\\N", "--null"),
        ("u1,(null)", "--null"),
        ("u1,NaN", "--null"),
        ("u1,undefined", "--null"),
        ("u1,#N/A", "error of a spreadsheet"),
        ("u1,#DIV/0!", "error of a spreadsheet"),
        ("u1,1.5E+10", "rounded"),
        ("u1,Paris,more", "3 cells"),
        ("(2 rows)", "1 cells"),
    ],
)
def test_a_cell_that_a_program_has_changed_is_refused(tmp_path: Path, row: str, rule: str) -> None:
    (refused, found), _ = read(tmp_path, f"user,city\n{row}\nu1,Paris\n")

    assert isinstance(refused, Unreadable)
    assert rule in refused.rule
    assert found == GOOD


def test_what_means_no_value_can_be_said(tmp_path: Path) -> None:
    found, _ = read(tmp_path, "user,city,tier\nu1,Paris,NULL\nu2,Oslo,nan\n", null="NULL")

    assert found == [GOOD, RawUpdate("u2", {"city": "Oslo", "tier": "nan"})]


def test_a_user_may_be_called_user(tmp_path: Path) -> None:
    found, notes = read(tmp_path, "id,city\nuser,Paris\n", user_column="id")

    assert found == [RawUpdate("user", {"city": "Paris"})]
    assert notes == []


def test_a_dry_run_shows_the_first_lines_as_they_were_understood(
    server: EmbeddedServer, client: redis.Redis, keys: Keys, tmp_path: Path
) -> None:
    path = tmp_path / "a.csv"
    path.write_text("user;city\nu1;Paris\nu2;NULL\nu3;Rome\n")
    settings = Settings(sdkappid=keys.sdkappid, redis_url=Secret(server.url))

    seen = Importer(settings, ImportOptions(path=path, as_of_ms=1_700_000_000_000)).rehearse()

    assert [(line, update.user, update.attrs) for line, update in seen.samples] == [
        (2, "u1", {"city": "Paris"}),
        (4, "u3", {"city": "Rome"}),
    ]
    assert seen.notes == ["separated by semicolons"]
    assert [(refusal.line, refusal.user) for refusal in seen.refusals] == [(3, "u2")]
    assert not client.exists(keys.pending, keys.imports)
