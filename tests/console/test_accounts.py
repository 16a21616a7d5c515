"""Who is in the accounts' file: what a line may say, and what happens when the file changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ManualClock
from tests.console.conftest import ANN, BOB, CHEAP
from worker.console import accounts
from worker.console.accounts import Accounts, Busy, hash_password, new_token, read_accounts
from worker.errors import ConfigError


def test_a_password_is_right_for_its_own_name_only(accounts_file: Path) -> None:
    found = Accounts(str(accounts_file))

    ann = found.with_password("ann", ANN)

    assert ann is not None
    assert (ann.name, ann.role) == ("ann", "operator")
    for name, password in (
        ("ann", BOB),
        ("bob", ANN),
        ("carl", ANN),
        ("", ""),
        ("ann", ""),
        ("ann", "x" * 9999),
    ):
        assert found.with_password(name, password) is None


def test_the_same_letters_are_the_same_password_however_they_were_typed(accounts_file: Path) -> None:
    hash = hash_password("cafe\u0301 au lait", CHEAP)
    accounts_file.write_text(f"zoe:viewer:{hash}\n")

    assert Accounts(str(accounts_file)).with_password("zoe", "caf\u00e9 au lait")


def test_a_hash_says_nothing_of_the_password_and_no_two_are_alike() -> None:
    one, other = hash_password(ANN, CHEAP), hash_password(ANN, CHEAP)

    assert one != other
    assert "password" not in one
    assert hash_password(ANN).startswith("scrypt$16384$8$5$")


@pytest.mark.parametrize("password", ["", "too short", "x" * 1001])
def test_a_password_has_bounds_and_is_not_repeated(password: str) -> None:
    with pytest.raises(ValueError, match=f"has {len(password)}$"):
        hash_password(password)


def test_a_token_is_known_by_its_hash_alone(accounts_file: Path) -> None:
    token, hash = new_token()
    accounts_file.write_text(f"robot:viewer:{hash}\n")
    found = Accounts(str(accounts_file))

    robot = found.with_token(token)

    assert robot is not None
    assert robot.name == "robot"
    assert token not in accounts_file.read_text()
    assert found.with_token(hash) is None
    assert found.with_token("") is None
    assert found.with_password("robot", token) is None


HASH = hash_password(ANN, CHEAP)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ann", "must be name:role:hash, has 1 parts"),
        (f"ann:operator:{HASH}:more", "has 4 parts"),
        (f"a b:operator:{HASH}", "has a name"),
        (f"<b>:operator:{HASH}", "has a name"),
        (f"ann:root:{HASH}", "has a role that is none of viewer, operator"),
        ("ann:operator:ann's own password", "has a hash that neither"),
        ("ann:operator:", "has a hash that neither"),
        (f"ann:operator:{HASH.replace('$16$', '$15$')}", "cost"),
        (f"ann:operator:{HASH.replace('$16$', '$16777216$')}", "cost"),
        (f"ann:operator:{HASH.replace('$1$1$', '$1$0$')}", "cost"),
        (f"ann:viewer:{HASH}\nann:operator:{HASH}", "line 4 has a second password"),
    ],
    # The hash is another one in each process.
    ids=range(11),
)
def test_a_wrong_line_is_named_with_its_rule_and_nothing_of_it(
    accounts_file: Path, line: str, words: str
) -> None:
    accounts_file.write_text(f"# people\n\n{line}\n")

    with pytest.raises(ConfigError) as raised:
        Accounts(str(accounts_file))

    [mistake] = raised.value.mistakes
    assert words in mistake
    assert "own password" not in mistake
    assert HASH not in mistake


@pytest.mark.parametrize("content", [b"", b"# nobody\n", b"\xff\xfe", b"x" * 1_000_001])
def test_a_file_without_accounts_is_a_mistake(accounts_file: Path, content: bytes) -> None:
    accounts_file.write_bytes(content)

    with pytest.raises(ConfigError):
        Accounts(str(accounts_file))


def test_a_missing_file_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(FileNotFoundError\)"):
        Accounts(str(tmp_path / "nothing"))


def test_a_changed_file_counts_within_a_second_and_what_was_right_before_does_not(
    accounts_file: Path, clock: ManualClock
) -> None:
    found = Accounts(str(accounts_file), clock)
    ann = found.with_password("ann", ANN)
    assert ann
    lines = accounts_file.read_text().splitlines()

    accounts_file.write_text(lines[1] + "\n")
    clock.sleep(1)

    assert found.with_password("ann", ANN) is None
    assert found.with_proof("ann", ann.proof) is None
    assert found.with_password("bob", BOB)


def test_another_role_ends_sessions(accounts_file: Path, clock: ManualClock) -> None:
    found = Accounts(str(accounts_file), clock)
    ann = found.with_password("ann", ANN)
    assert ann

    accounts_file.write_text(accounts_file.read_text().replace("ann:operator", "ann:viewer"))
    clock.sleep(1)

    assert found.with_proof("ann", ann.proof) is None


def test_while_the_file_cannot_be_read_nobody_is_in_it_and_lines_that_can_be_read_count(
    accounts_file: Path, clock: ManualClock
) -> None:
    found, content = Accounts(str(accounts_file), clock), accounts_file.read_text()

    accounts_file.unlink()
    clock.sleep(1)
    assert found.with_password("ann", ANN) is None

    accounts_file.write_text(content + "half a li")
    clock.sleep(1)
    assert found.with_password("ann", ANN)


def test_a_password_that_was_right_is_not_tried_again_for_a_while(
    accounts_file: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, tried = Accounts(str(accounts_file), clock), list[str]()
    scrypt = accounts._scrypt

    def counted(*given: Any) -> bytes:
        tried.append("once")
        return scrypt(*given)

    monkeypatch.setattr(accounts, "_scrypt", counted)

    for _ in range(3):
        assert found.with_password("ann", ANN)
    assert len(tried) == 1
    clock.sleep(accounts.REMEMBERED)
    assert found.with_password("ann", ANN)
    assert len(tried) == 2


def test_an_unknown_name_costs_as_much_as_a_known_one(
    accounts_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, tried = Accounts(str(accounts_file)), list[object]()
    scrypt = accounts._scrypt

    def counted(*given: Any) -> bytes:
        tried.append(given[2])
        return scrypt(*given)

    monkeypatch.setattr(accounts, "_scrypt", counted)

    found.with_password("ann", "wrong")
    found.with_password("nobody", "wrong")

    assert tried == [CHEAP, CHEAP]


def test_only_so_many_passwords_are_tried_at_once(accounts_file: Path) -> None:
    found = Accounts(str(accounts_file))
    for _ in range(accounts.WAITING):
        found._trying._waiting.acquire()

    with pytest.raises(Busy):
        found.with_password("ann", ANN)


def test_a_byte_order_mark_and_windows_lines_do_not_matter() -> None:
    found, mistakes = read_accounts(f"\ufeffann : operator : {HASH}\r\n\r\n")

    assert ([one.name for one in found], mistakes) == (["ann"], [])
