"""Settings: defaults, every mistake at once, and secrets that do not show."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests import docs
from tests.conftest import SECRET_KEY
from worker.config import PREFIX, REGIONS, Role, Settings
from worker.errors import ConfigError

GOOD = {
    "IMATTR_SDKAPPID": "1400000000",
    "IMATTR_SECRET_KEY": SECRET_KEY,
    "IMATTR_API_URL": "http://127.0.0.1:9000",
    "IMATTR_REDIS_URL": "redis://:hunter22@127.0.0.1:6379/0",
}


def mistakes(environ: dict[str, str], role: Role = "worker") -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        Settings.from_env(environ, role)
    return caught.value.mistakes


def changed(**changes: str) -> dict[str, str]:
    return GOOD | {PREFIX + name: value for name, value in changes.items()}


def without(*names: str) -> dict[str, str]:
    return {name: value for name, value in GOOD.items() if name.removeprefix(PREFIX) not in names}


def test_the_defaults_are_those_of_the_readme() -> None:
    settings = Settings.from_env(GOOD)

    assert (settings.quota, settings.batch_size, settings.linger) == (100, 100, 0.25)
    assert (settings.max_attempts, settings.backoff_base, settings.backoff_max) == (8, 1.0, 300.0)
    assert (settings.connect_timeout, settings.read_timeout, settings.hold) == (3.05, 10.0, 5.0)
    assert (settings.lease, settings.patience, settings.max_pending) == (60.0, 2.0, 0)
    assert (settings.shadow_ttl, settings.shadow_max_users) == (900.0, 1_000_000)
    assert settings.broker == settings.redis


def test_an_audit_needs_a_memory_to_compare_with() -> None:
    assert Settings.from_env(changed(AUDIT="6")).audit == 6
    assert Settings.from_env(changed(SHADOW_TTL="0")).audit == 0
    assert any("IMATTR_AUDIT needs" in mistake for mistake in mistakes(changed(AUDIT="6", SHADOW_TTL="0")))
    assert mistakes(changed(AUDIT="-1")) == ("IMATTR_AUDIT must be a whole number from 0 to 6000",)


def test_the_page_on_settings_is_what_the_fields_say() -> None:
    page = docs.settings()

    assert docs.SETTINGS.read_text() == page, "make docs"
    for field in dataclasses.fields(Settings):
        assert field.metadata["doc"]
        assert f"| `{field.name.upper()}` |" in page


def test_all_errors_are_reported_together_by_name() -> None:
    environ = changed(QUOTA="many", LINGER="-1", API="carrier pigeon", READ_TIMEOUT="2") | {
        "IMATTR_LINGR": "1"
    }
    del environ["IMATTR_SECRET_KEY"]

    assert set(mistakes(environ)) == {
        "IMATTR_QUOTA must be a whole number from 1 to 1000",
        "IMATTR_LINGER must be a number of seconds, at least 0 and at most 60",
        "IMATTR_API must be one of chat, push",
        "IMATTR_READ_TIMEOUT must be a number of seconds, more than 3 and at most 300",
        "unknown setting IMATTR_LINGR; did you mean IMATTR_LINGER?",
        "IMATTR_SECRET_KEY is not set",
    }


def test_what_is_missing_is_told() -> None:
    assert mistakes({}) == (
        "IMATTR_SDKAPPID is not set",
        "IMATTR_REDIS_URL is not set",
        "IMATTR_SECRET_KEY is not set",
        "IMATTR_REGION or IMATTR_API_URL is not set",
    )


def test_a_password_is_in_the_url_or_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("hunter22")
    for name in ("REDIS", "BROKER"):
        given = {f"{name}_URL": "redis://:hunter33@h", f"{name}_PASSWORD_FILE": str(file)}

        assert mistakes(changed(**given)) == (
            f"IMATTR_{name}_URL has a password and IMATTR_{name}_PASSWORD_FILE is set, choose one",
        )


def test_a_producer_needs_the_app_and_redis_only() -> None:
    assert Settings.from_env(without("SECRET_KEY", "API_URL"), "producer").sdkappid == 1400000000
    assert len(mistakes({}, "producer")) == 2


@pytest.mark.parametrize(
    ("changes", "mistake"),
    [
        ({"LEASE": "20"}, "IMATTR_LEASE must be more than twice"),
        ({"HOLD": "3"}, "IMATTR_HOLD must be a number of seconds, more than 3"),
        ({"BACKOFF_BASE": "10", "BACKOFF_MAX": "5"}, "IMATTR_BACKOFF_MAX must not be less"),
        ({"PATIENCE": "0.01"}, "IMATTR_PATIENCE must be at least 0.02"),
        ({"REGION": "tokyo"}, "IMATTR_REGION and IMATTR_API_URL are both set"),
        ({"BATCH_SIZE": "101"}, "IMATTR_BATCH_SIZE must be a whole number from 1 to 100"),
        ({"SDKAPPID": "0"}, "IMATTR_SDKAPPID must be a whole number from 1 up"),
        ({"API_URL": "http://.no-host"}, "IMATTR_API_URL must be a URL that starts with"),
        ({"REDIS_URL": "localhost:6379"}, "IMATTR_REDIS_URL must be a URL that starts with redis://"),
        ({"ADMIN": "管理员"}, "IMATTR_ADMIN must be 1 to 32 bytes of printable ASCII"),
        ({"LINGER": "nan"}, "IMATTR_LINGER must be a number of seconds"),
        ({"BROKER_PREFIX": "a b"}, "IMATTR_BROKER_PREFIX must not contain spaces"),
        ({"BROKER_PREFIX": "[1]"}, "IMATTR_BROKER_PREFIX must not contain spaces, or any of * ? [ ]"),
    ],
)
def test_what_cannot_hold_is_refused(changes: dict[str, str], mistake: str) -> None:
    [found] = mistakes(changed(**changes))

    assert found.startswith(mistake)


@pytest.mark.parametrize("region", REGIONS)
def test_a_region_has_a_domain(region: str) -> None:
    settings = Settings.from_env(without("API_URL") | {"IMATTR_REGION": region.upper()})

    assert settings.base_url.startswith("https://")


def test_the_key_can_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(f"{SECRET_KEY}\n")
    environ = without("SECRET_KEY") | {"IMATTR_SECRET_KEY_FILE": str(path)}

    assert Settings.from_env(environ).secret_key.reveal() == SECRET_KEY
    assert mistakes(GOOD | environ) == (
        "IMATTR_SECRET_KEY and IMATTR_SECRET_KEY_FILE are both set, choose one",
    )
    path.write_text("")
    assert mistakes(environ) == ("IMATTR_SECRET_KEY_FILE is empty",)
    path.unlink()
    assert mistakes(environ) == ("IMATTR_SECRET_KEY_FILE cannot be read (FileNotFoundError)",)


def test_no_secret_is_shown() -> None:
    shown = repr(Settings.from_env(GOOD)) + str(mistakes(changed(QUOTA="x", REDIS_URL="http://:hunter22@x")))

    assert SECRET_KEY not in shown
    assert "hunter22" not in shown
    assert "***" in shown


def test_an_empty_variable_counts_as_not_set() -> None:
    assert Settings.from_env(changed(QUOTA=" ")).quota == 100


def test_a_task_is_always_shorter_than_what_makes_the_broker_repeat_it() -> None:
    settings = Settings.from_env(changed(LEASE="300"))

    assert settings.longest_task > 300


def mistake_of(**changes: str) -> str:
    return "\n".join(mistakes(changed(**changes), "producer"))


@pytest.mark.parametrize("password", ["hunter22℀", "hun[ter22]"])
def test_a_password_may_have_any_characters(password: str) -> None:
    settings = Settings.from_env(changed(REDIS_URL=f"redis://:{password}@127.0.0.1/0"))

    assert settings.redis.password == password
    assert "ter22" not in repr(settings) + repr(settings.redis) + str(settings.redis)


@pytest.mark.parametrize("quota", ["--5", "9" * 5000])
def test_a_strange_number_is_explained_in_our_words(quota: str) -> None:
    assert mistake_of(QUOTA=quota) == "IMATTR_QUOTA must be a whole number from 1 to 1000"


@pytest.mark.parametrize(
    "url", ["redis://127.0.0.1:port/0", "redis://127.0.0.1:99999/0", "redis://:hun/ter22@h:1/0"]
)
def test_a_bad_port_is_a_mistake_of_the_settings(url: str) -> None:
    assert "ter22" not in mistake_of(REDIS_URL=url)


def test_the_password_of_a_broker_of_its_own_is_not_shown() -> None:
    assert "hunter33" not in repr(Settings.from_env(changed(BROKER_URL="amqp://u:hunter33@h//")))


def test_a_producer_does_not_look_for_the_key() -> None:
    environ = without("SECRET_KEY") | {"IMATTR_SECRET_KEY_FILE": "/nowhere"}

    assert Settings.from_env(environ, "producer").sdkappid == 1400000000


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("IMATTR_SERVICE_HOST", "10.0.0.1"),
        ("IMATTR_SERVICE_PORT", "80"),
        ("IMATTR_SERVICE_PORT_HTTP", "80"),
        ("IMATTR_PORT", "tcp://10.0.0.1:80"),
        ("IMATTR_PORT_80_TCP", "tcp://10.0.0.1:80"),
        ("IMATTR_PORT_80_TCP_PROTO", "tcp"),
        ("IMATTR_PORT_80_TCP_ADDR", "10.0.0.1"),
        ("IMATTR_REDIS_SERVICE_HOST", "10.0.0.2"),
        ("IMATTR_REDIS_PORT", "tcp://10.0.0.2:6379"),
        ("IMATTR_WORKER_METRICS_PORT_9090_UDP_PORT", "9090"),
    ],
)
def test_what_the_platform_says_about_services_is_not_ours(variable: str, value: str) -> None:
    assert Settings.from_env(GOOD | {variable: value}).health_port == 0


def test_a_service_whose_variable_collides_with_ours_is_named() -> None:
    (mistake,) = mistakes(changed(HEALTH_PORT="tcp://10.0.0.3:8080"))

    assert mistake.startswith("IMATTR_HEALTH_PORT holds the address of a Service")


@pytest.mark.parametrize("name", ["PORTT", "SERVICE", "HEALTH_PROT", "SDKAPPID_HOST"])
def test_a_misspelt_setting_is_still_a_mistake(name: str) -> None:
    assert mistakes(changed(**{name: "1"}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"HOLD": "60"}, "IMATTR_HOLD"),
        ({"QUOTA": "100000"}, "IMATTR_QUOTA"),
        ({"LINGER": "1e9"}, "IMATTR_LINGER"),
        ({"LEASE": "1e9"}, "IMATTR_LEASE"),
        ({"BACKOFF_MAX": "1e300"}, "IMATTR_BACKOFF_MAX"),
        ({"READ_TIMEOUT": "1e6", "LEASE": "3600"}, "IMATTR_READ_TIMEOUT"),
        ({"PATIENCE": "1e6"}, "IMATTR_PATIENCE"),
        ({"SHADOW_TTL": "1e18"}, "IMATTR_SHADOW_TTL"),
        ({"MAX_AHEAD": "-1"}, "IMATTR_MAX_AHEAD"),
        ({"MAX_ATTEMPTS": "9" * 18}, "IMATTR_MAX_ATTEMPTS"),
    ],
)
def test_settings_that_would_break_a_promise_are_refused(changes: dict[str, str], named: str) -> None:
    assert any(named in mistake for mistake in mistakes(changed(**changes)))


@pytest.mark.parametrize(
    "written",
    [
        f'"{SECRET_KEY}"',
        f"'{SECRET_KEY}'\n",
        f"\ufeff{SECRET_KEY}",
        f'\ufeff"{SECRET_KEY}"\r\n',
        f"  {SECRET_KEY}\n\n",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_key_is_read_as_it_was_meant(tmp_path: Path, written: str, encoding: str) -> None:
    path = tmp_path / "key"
    path.write_bytes(written.encode(encoding))

    from_file = Settings.from_env(without("SECRET_KEY") | {"IMATTR_SECRET_KEY_FILE": str(path)})
    assert from_file.current_key().reveal() == SECRET_KEY
    assert Settings.from_env(changed(SECRET_KEY=written)).secret_key.reveal() == SECRET_KEY


@pytest.mark.parametrize(
    "written", [f"SECRET_KEY={SECRET_KEY}", f"{SECRET_KEY}\n{SECRET_KEY}", "clé", "a\0b"]
)
def test_what_is_no_key_is_named_and_never_shown(tmp_path: Path, written: str) -> None:
    path = tmp_path / "key"
    path.write_text(written)

    (mistake,) = mistakes(without("SECRET_KEY") | {"IMATTR_SECRET_KEY_FILE": str(path)})

    assert "IMATTR_SECRET_KEY_FILE must be the key alone" in mistake
    assert SECRET_KEY not in mistake


@pytest.mark.parametrize("name", ["REDIS_URL", "BROKER_URL"])
@pytest.mark.parametrize("password", ["pa#ss", "pa/ss", "pa?ss", "a/b#c?d"])
def test_a_password_that_ends_a_url_early_is_named(name: str, password: str) -> None:
    (mistake,) = mistakes(changed(**{name: f"redis://:{password}@127.0.0.1:6379/0"}))

    assert "%2F, %3F and %23" in mistake
    assert password not in mistake
