"""Every way to write where a Redis is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from worker.redis_url import RedisUrl, read_redis_url, with_password_file
from worker.state.connection import ConnectionError, client_options

TLS = {"ssl_cert_reqs": "required", "ssl_check_hostname": True}


@pytest.mark.parametrize(
    ("url", "read"),
    [
        ("redis://h", RedisUrl("server", (("h", 6379),))),
        ("redis://h:1/2", RedisUrl("server", (("h", 1),), database=2)),
        ("REDIS://h.example.:1", RedisUrl("server", (("h.example.", 1),))),
        ("redis://h?db=3&protocol=3", RedisUrl("server", (("h", 6379),), database=3)),
        ("redis://[::1]:7/0", RedisUrl("server", (("::1", 7),))),
        ("redis://:p%40s%2Fs@h", RedisUrl("server", (("h", 6379),), password="p@s/s")),
        ("redis://me:p:w@x@h", RedisUrl("server", (("h", 6379),), username="me", password="p:w@x")),
        ("rediss://h", RedisUrl("server", (("h", 6379),), tls=True, tls_options=TLS)),
        (
            "rediss://h?ssl_cert_reqs=CERT_NONE",
            RedisUrl(
                "server",
                (("h", 6379),),
                tls=True,
                tls_options={"ssl_cert_reqs": "none", "ssl_check_hostname": False},
            ),
        ),
        (
            "rediss://h?ssl_ca_certs=/ca&ssl_certfile=/c&ssl_keyfile=/k",
            RedisUrl(
                "server",
                (("h", 6379),),
                tls=True,
                tls_options=TLS | {"ssl_ca_certs": "/ca", "ssl_certfile": "/c", "ssl_keyfile": "/k"},
            ),
        ),
        (
            "redis+sentinel://me:pw@a,b:2,c:3/mine/4?sentinel_username=s&sentinel_password=t",
            RedisUrl(
                "sentinel",
                (("a", 26379), ("b", 2), ("c", 3)),
                service="mine",
                database=4,
                username="me",
                password="pw",
                sentinel_username="s",
                sentinel_password="t",
            ),
        ),
        ("redis+cluster://a:1,b:2", RedisUrl("cluster", (("a", 1), ("b", 2)))),
        ("unix:///run/r.sock?db=1", RedisUrl("socket", path="/run/r.sock", database=1)),
        ("unix://me:pw@/run/r.sock", RedisUrl("socket", path="/run/r.sock", username="me", password="pw")),
    ],
)
def test_a_url_is_read(url: str, read: RedisUrl) -> None:
    assert read_redis_url(url) == read


@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("", "starts with redis://"),
        ("host:6379", "starts with redis://"),
        ("http://h", "starts with redis://"),
        ("redis://", "host or host:port"),
        ("redis://h:0", "from 1 to 65535"),
        ("redis://h:99999", "from 1 to 65535"),
        ("redis://h:port", "host or host:port"),
        ("redis://a b", "host or host:port"),
        ("redis://a,b", "redis+sentinel:// or redis+cluster://"),
        ("redis://h/abc", "database by a number"),
        ("redis://h/1/2", "more in its path"),
        ("redis://h?db=x", "database by a number"),
        ("redis://h?ssl_cert_reqs=none", "begin it with rediss"),
        ("rediss://h?ssl_cert_reqs=maybe", "none, optional or required"),
        ("rediss://h?ssl_certfile=/c", "both ssl_certfile and ssl_keyfile"),
        ("redis://h?timeout=5", "option (7 characters)"),
        ("redis://h#1", "%23"),
        ("redis://:pa/ss@h", "%2F, %3F and %23"),
        ("redis+sentinel://a:1,b:2", "name of the service"),
        ("redis+cluster://a:1/3", "only database 0"),
        ("redis://h?sentinel_password=x", "begin it with redis+sentinel"),
        ("unix://run/r.sock", "absolute path"),
    ],
)
def test_a_url_that_cannot_be_right_is_explained(url: str, rule: str) -> None:
    with pytest.raises(ValueError, match=re.escape(rule)):
        read_redis_url(url)


@pytest.mark.parametrize("scheme", ["redis", "rediss", "redis+sentinel", "redis+cluster"])
def test_no_way_to_show_a_url_shows_a_secret(scheme: str) -> None:
    url = read_redis_url(f"{scheme}://me:hunter22@h:1/{'mine' if 'sentinel' in scheme else ''}")

    assert "hunter22" not in f"{url} {url!r}"
    assert "h:1" in str(url)


@pytest.mark.parametrize(
    "place", ["redis://{}@h", "redis+sentinel://{}@h/mine", "unix://{}@/s", "redis+cluster://{}@h"]
)
def test_account_and_password_may_have_any_characters(place: str) -> None:
    account = "ä@b:/?#", "p@ss:/?#[]%20 ü\"'\\&=+"

    url = read_redis_url(place.format(":".join(quote(text, "") for text in account)))

    assert (url.username, url.password) == account


def test_the_password_of_sentinels_may_have_any_characters() -> None:
    password = "p@ss:/?#[]%20 ü\"'\\&=+"

    url = read_redis_url(
        f"redis+sentinel://h/mine?sentinel_username=%26&sentinel_password={quote(password, '')}"
    )

    assert (url.sentinel_username, url.sentinel_password) == ("&", password)


def credentials(url: RedisUrl) -> Any:
    options = client_options(url, "key", timeout=1, connect_timeout=1)
    assert (options.get("username"), options.get("password")) == (None, None)
    return options["credential_provider"]


def test_a_password_in_a_file_is_taken_as_it_is_and_read_each_time(tmp_path: Path) -> None:
    file = tmp_path / "password"
    known = credentials(with_password_file("redis://me@h", str(file)))
    unnamed = credentials(with_password_file("redis://h", str(file)))

    for raw, password in ((" p@s%20 \r\n", " p@s%20 "), ("ü\n", "ü"), ("\ufeffbom", "bom")):
        file.write_text(raw, encoding="utf-8", newline="")
        assert known.get_credentials() == ("me", password)
        assert unnamed.get_credentials() == (password,)


@pytest.mark.parametrize("half_done", ["removed", "empty", "garbled"])
def test_while_the_file_is_being_replaced_the_last_password_is_used(tmp_path: Path, half_done: str) -> None:
    file = tmp_path / "password"
    provider = credentials(with_password_file("redis://h", str(file)))
    file.write_text("first")
    assert provider.get_credentials() == ("first",)

    if half_done == "removed":
        file.unlink()
    else:
        file.write_bytes(b"" if half_done == "empty" else b"\xff\xfe\xff")

    assert provider.get_credentials() == ("first",)


def test_a_password_file_that_never_had_a_password_is_named(tmp_path: Path) -> None:
    file = tmp_path / "password"
    provider = credentials(with_password_file("redis://h", str(file)))

    with pytest.raises(ConnectionError, match=r"password, cannot be read \(FileNotFoundError\)"):
        provider.get_credentials()
    file.write_text("\n")
    with pytest.raises(ConnectionError, match="password, is empty"):
        provider.get_credentials()


def test_a_password_both_in_the_url_and_in_a_file_is_refused() -> None:
    with pytest.raises(ValueError, match="choose one") as caught:
        with_password_file("redis://:hunter22@h", "/file")

    assert "hunter22" not in str(caught.value)
