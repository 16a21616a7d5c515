"""Each guide's project: its files are written down as the page names them, and used as its readers would."""

from __future__ import annotations

import gzip
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

from tests.conftest import SECRET_KEY, ManualClock
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


def page(guide: str) -> str:
    return (GUIDES / f"{guide}.md").read_text()


def files(guide: str) -> dict[str, str]:
    return dict(FILE.findall(page(guide)))


def python(code: str, directory: Path, environ: dict[str, str], expected: int = 0, *arguments: str) -> str:
    """Run code in a process of its own, with nothing in its environment but this; returns what it prints."""
    path = os.pathsep.join([str(directory), *sys.path])
    done = subprocess.run(
        [sys.executable, "-W", "error::SyntaxWarning", "-c", code, *arguments],
        cwd=directory,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": path, **environ},
        capture_output=True,
        text=True,
    )
    assert done.returncode == expected, done.stderr
    return done.stdout


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
        environ = {"IMATTR_REDIS_URL": url, "IMATTR_SDKAPPID": str(keys.sdkappid)}
        return python(code, tmp_path, environ, 0, *arguments)

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
elif sys.argv[1] == "save more":
    profile = Profile.objects.create(user_id="u1", city="Paris", level="Gold")
    with transaction.atomic():
        profile.city = "Oslo"
        profile.save()
        try:
            with transaction.atomic():
                profile.city = "Rome"
                profile.save()
                raise KeyError
        except KeyError:
            pass
        profile.level = "never saved"
    outdated = Profile.objects.get(user_id="u1")
    Profile.objects.update_or_create(user_id="u1", defaults={"level": "Silver"})
    outdated.city = "Bergen"
    outdated.save(update_fields=["city"])
    with transaction.atomic():
        profile = Profile.objects.create(user_id="u2", city="Paris")
        profile.delete()
else:
    call_command(sys.argv[1])
print(sorted(Profile.objects.filter(sent_at=F("changed_at")).values_list("user_id", flat=True)))
"""


def test_a_django_project_sends_what_it_commits(run: Run, client: redis.Redis, keys: Keys) -> None:
    sent = run("django", DJANGO, "save")

    assert pending(client, keys) == {"u1": {"city": "Paris", "level": False}}
    assert sent == "['u1']\n"


def test_a_django_project_sends_what_the_database_has(run: Run, client: redis.Redis, keys: Keys) -> None:
    sent = run("django", DJANGO, "save more")

    assert pending(client, keys) == {"u1": {"city": "Bergen", "level": "Silver"}}
    assert sent == "['u1']\n"


def test_a_django_project_remembers_what_an_outage_left_of_part_of_a_profile(
    run: Run, client: redis.Redis, keys: Keys
) -> None:
    run("django", DJANGO, "save")
    part = 'Profile.objects.get(user_id="u1").save(update_fields=["city"])'
    assert run("django", DJANGO.replace("call_command(sys.argv[1])", part), "part", url=NOWHERE) == "[]\n"

    assert run("django", DJANGO, "send_attributes") == "['u1']\n"


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
print(*(answer.status_code for answer in answers))

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

    assert answers == "204 204 204\n"
    assert pending(client, keys) == {"u1": {"city": "Oslo", "level": False}}


def test_a_fastapi_application_survives_an_outage(run: Run) -> None:
    assert run("fastapi", FASTAPI, url=NOWHERE) == "204 204 204\n"


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


def test_a_celery_project_hears_that_the_broker_is_down(run: Run) -> None:
    run(
        "celery",
        """
from kombu.exceptions import OperationalError
from shop.tasks import app, profiles_changed

app.conf.broker_url = "redis://127.0.0.1:1/0"
try:
    profiles_changed([("u1", "Oslo")])
except OperationalError:
    raise SystemExit
raise AssertionError("sent")
""",
    )


def test_two_apps_share_a_broker(server: EmbeddedServer, client: redis.Redis, tmp_path: Path) -> None:
    (fragment,) = re.findall(
        r"<!-- no-run -->\n```python\n(.*?)^```", page("many-apps"), re.MULTILINE | re.DOTALL
    )
    send = "from celery import Celery\n" + fragment.replace("redis://redis:6379/0", server.url)
    send += "app1.send_task('attributes.update', ['u1', {'city': 'Oslo'}], queue='updates')\n"
    read = "from worker.celery import app\nprint(app.conf.broker_transport_options['global_keyprefix'])"
    environ = {"IMATTR_REDIS_URL": server.url, "IMATTR_SDKAPPID": "1", "IMATTR_BROKER_PREFIX": "app1:"}
    environ |= {"IMATTR_SECRET_KEY": SECRET_KEY, "IMATTR_REGION": "singapore"}
    try:
        python(send, tmp_path, {})
        assert client.llen("app1:updates") == 1
        assert python(read, tmp_path, environ) == "app1:\n"
    finally:
        client.delete("app1:updates", "app1:_kombu.binding.updates")


def test_a_second_project_of_compose_shares_nothing_with_the_first() -> None:
    """Whatever of this machine compose uses is named by a variable that the page sets."""
    compose = (GUIDES.parents[1] / "docker" / "compose.yaml").read_text()
    (settings,) = re.findall(r'^```sh title=".*"\n(.*?)^```', page("many-apps"), re.MULTILINE | re.DOTALL)
    used = re.findall(r"(?:ports: ..127\.0\.0\.1:|file: )\$\{(\w+):-", compose)

    assert len(used) == compose.count("ports:") + compose.count("    file: ") == 5
    assert set(used) < {line.partition("=")[0] for line in settings.splitlines()}


def test_a_file_is_imported_as_the_page_says(
    tmp_path: Path, server: EmbeddedServer, client: redis.Redis, keys: Keys
) -> None:
    (rows,) = re.findall(r"^```\n(user,.*?)^```", page("files"), re.MULTILINE | re.DOTALL)
    (line,) = re.findall(r"^```json\n(.*?)^```", page("files"), re.MULTILINE | re.DOTALL)
    (shown,) = re.findall(
        r"^\$ imattr import users.csv.gz --dry-run\n(.*?)^```", page("files"), re.MULTILINE | re.DOTALL
    )
    (tmp_path / "users.csv.gz").write_bytes(gzip.compress(f"{rows}u3,{'x' * 60},\n".encode()))
    (tmp_path / "one.jsonl").write_text(line)
    environ = {"IMATTR_REDIS_URL": server.url, "IMATTR_SDKAPPID": str(keys.sdkappid), "COLUMNS": "140"}

    def imattr(*words: str, code: int = 0) -> str:
        call = f"import sys\nfrom worker.cli.main import main\nsys.argv = {['imattr', *words]}\nmain()"
        return python(call, tmp_path, environ, code)

    dry = imattr("import", "users.csv.gz", "--dry-run", code=3)
    assert not client.exists(keys.pending)
    moment = r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00"
    assert [re.sub(moment, "T", row).split() for row in dry.splitlines()] == [
        re.sub(moment, "T", row).split() for row in shown.splitlines()
    ]

    imattr("import", "users.csv.gz", code=3)
    assert pending(client, keys) == {"u1": {"city": "Paris", "level": "Gold"}, "u2": {"city": "Oslo"}}
    (refused,) = (tmp_path / "users.csv.gz.refused.jsonl").read_text().splitlines()
    assert json.loads(refused) == {
        "line": 4,
        "user": "u3",
        "rule": "the value of 'city' is 60 bytes, at most 50",
    }

    imattr("import", "one.jsonl")
    assert pending(client, keys)["u1"] == {"city": "Paris", "level": False}
