"""Each guide's project: its files are written down as the page names them, and used as its readers would."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.conftest import ManualClock
from worker.intake.brokers import RedisQueue
from worker.intake.celery_queue import QueueConsumer
from worker.producer import Producer
from worker.sandbox.redis_server import EmbeddedServer
from worker.state.keys import Keys
from worker.state.refused import Refused
from worker.state.scripts import text

GUIDES = Path(__file__).parents[2] / "docs" / "guides"
#: A block that is a file, and its name.
FILE = re.compile(r'^```python title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)

#: Who tries the files of which page.
TRIED = {"celery", "django", "fastapi", "flask"}

Run = Callable[..., str]


def files(guide: str) -> dict[str, str]:
    return dict(FILE.findall((GUIDES / f"{guide}.md").read_text()))


def test_every_file_in_a_guide_is_tried() -> None:
    assert {page.stem for page in GUIDES.glob("*.md") if files(page.stem)} == TRIED


@pytest.fixture
def run(tmp_path: Path, server: EmbeddedServer, keys: Keys) -> Run:
    """Run Python with the files of a guide, with Redis, or without."""

    def begin(guide: str, code: str, *arguments: str, url: str = server.url) -> str:
        for name, content in files(guide).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content.replace("redis://redis:6379/0", server.url))
        environ = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
            "IMATTR_REDIS_URL": url,
            "IMATTR_SDKAPPID": str(keys.sdkappid),
        }
        done = subprocess.run(
            [sys.executable, "-W", "error::SyntaxWarning", "-c", code, *arguments],
            cwd=tmp_path,
            env=environ,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return begin


def pending(client: redis.Redis, keys: Keys) -> dict[str, dict[str, Any]]:
    return {
        text(user): {name: value for name, (value, _) in json.loads(record)["a"].items()}
        for user, record in client.hgetall(keys.pending).items()
    }


NOWHERE = "redis://127.0.0.1:1/0"

DJANGO = """
import sys
import django
from django.conf import settings
from django.core.management import call_command
from django.db import connection, transaction
from django.db.models import F

settings.configure(
    INSTALLED_APPS=["profiles"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "shop.sqlite"}},
    USE_TZ=True,
)
django.setup()
from profiles.models import Profile

if sys.argv[1] == "test":
    call_command("test", "profiles", verbosity=0)
    raise SystemExit
if "profiles_profile" not in connection.introspection.table_names():
    with connection.schema_editor() as editor:
        editor.create_model(Profile)
if sys.argv[1] == "save":
    Profile.objects.create(user_id="u1", city="Paris", level="Gold")
    try:
        with transaction.atomic():
            Profile.objects.create(user_id="u2", city="Oslo")
            raise KeyError
    except KeyError:
        pass
    Profile.objects.create(user_id="u3", city="x" * 60)
    with transaction.atomic():
        profile = Profile.objects.get(user_id="u1")
        profile.level = ""
        profile.save()
else:
    call_command(sys.argv[1])
print(sorted(Profile.objects.filter(sent_at=F("changed_at")).values_list("user_id", flat=True)))
"""


def test_a_django_project_sends_what_it_commits(run: Run, client: redis.Redis, keys: Keys) -> None:
    sent = run("django", DJANGO, "save")

    assert pending(client, keys) == {"u1": {"city": "Paris", "level": False}}
    assert sent == "['u1']\n"


def test_a_django_project_sends_later_what_an_outage_left(run: Run, client: redis.Redis, keys: Keys) -> None:
    assert run("django", DJANGO, "save", url=NOWHERE) == "[]\n"
    assert not pending(client, keys)

    sent = run("django", DJANGO, "send_attributes")

    assert pending(client, keys) == {"u1": {"city": "Paris", "level": False}}
    assert sent == "['u1']\n"


def test_the_tests_of_a_django_project_need_no_redis(run: Run) -> None:
    run("django", DJANGO, "test", url=NOWHERE)


FLASK = """
import sys
from shop import create_app

app = create_app()
if sys.argv[1] == "save":
    web = app.test_client()
    assert web.put("/profiles/u1", json={"city": "Paris", "level": "Gold"}).status_code == 204
    assert web.put("/profiles/u1", json={"city": "Oslo"}).status_code == 204
    assert web.put("/profiles/u2", json={"city": "x" * 60}).status_code == 204
else:
    print(app.test_cli_runner().invoke(args=["send-attributes"]).stdout, end="")
"""


def test_a_flask_application_sends_what_it_commits(run: Run, client: redis.Redis, keys: Keys) -> None:
    run("flask", FLASK, "save")

    assert pending(client, keys) == {"u1": {"city": "Oslo", "level": False}}
    assert run("flask", FLASK, "send") == "sent 0 of 1\n"


def test_a_flask_application_sends_later_what_an_outage_left(
    run: Run, client: redis.Redis, keys: Keys
) -> None:
    run("flask", FLASK, "save", url=NOWHERE)
    assert not pending(client, keys)

    assert run("flask", FLASK, "send") == "sent 1 of 2\n"
    assert pending(client, keys) == {"u1": {"city": "Oslo", "level": False}}


FASTAPI = """
import shop
from fastapi.testclient import TestClient

with TestClient(shop.app) as web:
    answers = [
        web.put("/profiles/u1", json={"city": "Paris", "level": "Gold"}),
        web.put("/profiles/u1", json={"city": "Oslo"}),
        web.put("/profiles/u2", json={"city": "x" * 60}),
    ]
print(*(answer.status_code for answer in answers), answers[-1].text)

class Fake:
    async def set(self, *args, **kwargs):
        sent.append(args)

sent, fake = [], Fake()
shop.app.dependency_overrides[shop.producer_of] = lambda: fake
assert TestClient(shop.app).put("/profiles/u4", json={"city": "Rome"}).status_code == 204
assert sent == [("u4", {"city": "Rome", "level": None})]
"""


def test_a_fastapi_application_sends_what_it_saves(run: Run, client: redis.Redis, keys: Keys) -> None:
    answers = run("fastapi", FASTAPI)

    assert answers.startswith("204 204 422 ")
    assert "the value of 'city' is 60 bytes, at most 50" in answers
    assert pending(client, keys) == {"u1": {"city": "Oslo", "level": False}}


def test_a_fastapi_application_survives_an_outage(run: Run) -> None:
    assert run("fastapi", FASTAPI, url=NOWHERE).startswith("204 204 204 ")


CELERY = """
from datetime import UTC, datetime
from shop.tasks import app, profile_changed, profiles_changed

profile_changed("u1", "Paris", None, datetime(2026, 11, 1, tzinfo=UTC))
profiles_changed([("u2", "Oslo"), ("u3", "x" * 60)])
app.send_task("shop.own")
"""


def test_a_celery_project_sends_by_name(
    run: Run, server: EmbeddedServer, client: redis.Redis, keys: Keys, clock: ManualClock
) -> None:
    refused, lists = Refused(client, keys), ["updates", *(f"updates\x06\x16{step}" for step in (3, 6, 9))]
    try:
        run("celery", CELERY)
        consumer = QueueConsumer(
            client,
            keys,
            Producer(server.url, keys.sdkappid),
            refused,
            clock,
            lambda: RedisQueue(client, lists, name="updates", close=lambda: None),
            worker="w1",
            report=lambda *_: None,
        )
        consumer.turn()

        assert pending(client, keys) == {"u1": {"city": "Paris", "level": False}, "u2": {"city": "Oslo"}}
        assert [update.rule for update in refused.newest(10)] == [
            "the value of 'city' is 60 bytes, at most 50"
        ]
        assert client.llen("celery") == 1
    finally:
        client.delete(*lists, "celery", "_kombu.binding.updates", "_kombu.binding.celery")
