"""Every way to write where a Redis is."""

from __future__ import annotations

import re

import pytest

from worker.redis_url import RedisUrl, read_redis_url

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
