"""Log lines: one JSON object each, without secrets, whoever writes them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from tests.conftest import SECRET_KEY
from worker import logs
from worker.config import Secret


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    for name in ("celery", "kombu", "amqp", "urllib3", "celery.worker.strategy", "celery.app.trace"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    structlog.reset_defaults()
    logs._secrets.clear()


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Any:
    def read() -> list[dict[str, Any]]:
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return read


def test_a_line_is_one_json_object_with_what_it_is_about_first(lines: Any) -> None:
    logs.configure("info", "json")

    structlog.get_logger().info("batch_settled", users=3, code=None)

    [line] = lines()
    assert list(line) == ["timestamp", "level", "event", "users"]
    assert (line["level"], line["event"], line["users"]) == ("info", "batch_settled", 3)


def test_a_secret_does_not_show_however_deep_it_lies(lines: Any) -> None:
    logs.configure("info", "json")
    secret = Secret(SECRET_KEY)

    structlog.get_logger().info("x", a=secret, b={"c": [secret]}, d=(secret,))

    assert SECRET_KEY not in str(lines())


@pytest.mark.parametrize(
    "text",
    [
        f"the key is {SECRET_KEY}",
        f"POST /v4/x?sdkappid=1&usersig={SECRET_KEY}&random=3",
        f"'usersig': '{SECRET_KEY}'",
        f"redis://user:{SECRET_KEY}@host:6379/0",
    ],
)
def test_a_secret_in_a_text_is_removed_from_everybodys_lines(text: str, lines: Any) -> None:
    logs.configure("info", "json")
    if "key is" in text:
        logs.protect(SECRET_KEY)

    structlog.get_logger().warning("x", url=text)
    logging.getLogger("somebody.else").warning("it said %s", text)
    try:
        raise OSError(text)
    except OSError:
        logging.getLogger("somebody.else").exception("failed")
        structlog.get_logger().exception("failed")

    found = lines()
    assert len(found) == 4
    assert SECRET_KEY not in str(found)
    assert logs.HIDDEN in str(found)


def test_libraries_that_log_urls_and_messages_are_kept_quiet(lines: Any) -> None:
    logs.configure("debug", "json")

    logging.getLogger("urllib3.connectionpool").warning("Retrying /x?usersig=abc")
    logging.getLogger("celery.pool").debug("Apply (args: ...)")
    logging.getLogger("kombu.transport").debug("message")
    logging.getLogger("mine").debug("seen")

    assert [line["event"] for line in lines()] == ["seen"]


def test_text_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "text")

    structlog.get_logger().info("batch_settled", users=3)

    assert "batch_settled" in capsys.readouterr().out


def test_a_secret_inside_another_leaves_nothing_of_it() -> None:
    logs.protect(*[f"abcd{'x' * n}" for n in range(8)])

    assert logs.scrub("abcdxxxxxxx") == "***"


def test_a_password_with_an_at_sign_is_removed() -> None:
    assert "ss" not in logs.scrub("cannot reach redis://:p@ss@host:6379/0")


def test_a_secret_in_a_key_of_a_dict_is_removed(capsys: pytest.CaptureFixture[str]) -> None:
    logs.protect("hunter22hunter22")
    logs.configure("info", "json")

    structlog.get_logger().info("x", headers={"hunter22hunter22": 1})

    assert "hunter22" not in capsys.readouterr().out


def test_half_a_character_does_not_cost_the_line(lines: Any) -> None:
    logs.configure("info", "json")

    structlog.get_logger().info("x", said="caf\ud83d")

    assert lines()[0]["said"] == "caf?"
