"""Services are named by their own signs, and by nothing less."""

from __future__ import annotations

import pytest

from worker.operate.redis_services import SERVICES, identify


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("imattr-x1.serverless.use1.cache.amazonaws.com", "Amazon ElastiCache Serverless"),
        ("master.imattr.abc123.use1.cache.amazonaws.com", "Amazon ElastiCache"),
        ("imattr.abc123.ng.0001.cnn1.cache.amazonaws.com.cn", "Amazon ElastiCache"),
        ("clustercfg.imattr.abc123.memorydb.us-east-1.amazonaws.com", "Amazon MemoryDB"),
        ("imattr.eastus.redis.azure.net", "Azure Managed Redis"),
        ("imattr.redis.cache.windows.net", "Azure Cache for Redis"),
        ("gz-crs-abc123.sql.tencentcdb.com", "Tencent Cloud TencentDB"),
        ("r-bp1abc.redis.rds.aliyuncs.com", "Alibaba Cloud Tair"),
        ("r-t4nabc.redis.singapore.rds.aliyuncs.com.", "Alibaba Cloud Tair"),
        ("imattr-project.c.aivencloud.com", "Aiven"),
        ("AAAA-p.redis.us-ashburn-1.oci.oraclecloud.com", "OCI Cache"),
        ("ready-cat-1.upstash.io", "Upstash"),
    ],
)
def test_a_service_is_known_by_its_host_names(host: str, name: str) -> None:
    service = identify(["127.0.0.1", host], {})

    assert service
    assert service.name == name


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "10.0.0.5",
        "redis.internal",
        "cache.amazonaws.com.example.org",
        "db.rds.aliyuncs.com",
        "instance.us-east-1.rds.amazonaws.com",
        "notupstash.io",
    ],
)
def test_nothing_is_claimed_about_other_hosts(host: str) -> None:
    assert (
        identify([host], {"redis_version": "7.2.4", "valkey_version": "8.1.0", "availability_zone": ""})
        is None
    )


@pytest.mark.parametrize(
    ("field", "name"),
    [("dragonfly_version", "Dragonfly"), ("mvcc_depth", "KeyDB"), ("upstash_version", "Upstash")],
)
def test_a_server_is_known_by_a_field_of_its_own(field: str, name: str) -> None:
    service = identify(["localhost"], {"redis_version": "6.3.4", field: "1"})

    assert service
    assert service.name == name


def test_every_service_has_a_sign() -> None:
    assert all(service.host or service.field for service in SERVICES)
