"""Redis services that can be recognised, and what is different about each: from their documents, none has been tried.

A service is recognised only by something unique: the end of its host names, or a field of INFO that no other has. Many are
reached by a bare address and show nothing; then nothing is claimed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Service:
    """A service, or a server that is not Redis or Valkey. Hosts are regular expressions for the end of the name."""

    name: str
    host: str = ""
    #: A field that only its INFO has.
    field: str = ""
    #: How to make a full server refuse new data.
    noeviction: str = "set maxmemory-policy noeviction"
    #: What to do if it refuses scripts.
    scripts: str = ""
    #: What else a person should know.
    notes: Sequence[str] = ()


_DATABASE_0 = (
    "one cluster: only database 0, and Celery's keys need a hash tag (IMATTR_BROKER_PREFIX={imattr})"
)

SERVICES = (
    Service(
        "Amazon ElastiCache Serverless",
        r"\.serverless\.[a-z0-9-]+\.cache\.amazonaws\.com(\.cn)?",
        noeviction="nothing can be configured there: use an ElastiCache of nodes, with noeviction in its parameter group",
        notes=[_DATABASE_0],
    ),
    Service(
        "Amazon ElastiCache",
        r"\.cache\.amazonaws\.com(\.cn)?",
        noeviction="set maxmemory-policy noeviction in the parameter group",
        notes=["CONFIG is refused: check in the parameter group what cannot be checked here"],
    ),
    Service(
        "Amazon MemoryDB",
        r"\.memorydb\.[a-z0-9-]+\.amazonaws\.com(\.cn)?",
        noeviction="set maxmemory-policy noeviction in the parameter group",
        notes=[
            _DATABASE_0,
            "everything it has acknowledged is in a log across several zones: a failover loses nothing",
        ],
    ),
    Service(
        "Azure Managed Redis",
        r"\.redis\.azure\.net",
        noeviction="set the eviction policy of the database to NoEviction",
        notes=["with the OSS cluster policy, write redis+cluster:// or rediss+cluster://"],
    ),
    Service("Azure Cache for Redis", r"\.redis\.cache\.windows\.net"),
    Service(
        "Tencent Cloud TencentDB",
        r"\.tencentcdb\.com",
        notes=["in a cluster, IMATTR_REPLICAS needs a proxy of version 5.5, with TLS 5.6"],
    ),
    Service(
        "Alibaba Cloud Tair",
        r"\.redis\.([a-z0-9-]+\.)?rds\.aliyuncs\.com",
        scripts="set the parameter script_check_enable to 0: all keys of an app are in one slot",
        notes=["the proxies of clusters may refuse WAIT, which IMATTR_REPLICAS needs"],
    ),
    Service("Aiven", r"\.aivencloud\.com", notes=["CONFIG is refused: the service manages the settings"]),
    Service(
        "OCI Cache",
        r"\.redis\.[a-z0-9-]+\.oci\.oraclecloud\.com",
        scripts="use a cluster that is not sharded: sharded ones run no scripts",
    ),
    Service(
        "Upstash",
        r"\.upstash\.io",
        "upstash_version",
        notes=["INFO says nothing about persistence", "each command is billed, and each batch takes several"],
    ),
    Service(
        "Dragonfly",
        field="dragonfly_version",
        notes=["with --cluster_mode=emulated --lock_on_hashtags, a script locks only the keys of its app"],
    ),
    Service(
        "KeyDB",
        field="mvcc_depth",
        notes=["active-replica must be off: two servers that accept writes each grant the whole quota"],
    ),
)


def identify(hosts: Sequence[str], info: Mapping[str, Any]) -> Service | None:
    """The service with one of these host names, or this INFO; None if there is no certain sign."""
    for service in SERVICES:
        if service.field and service.field in info:
            return service
        if service.host and any(re.search(rf"{service.host}\.?$", host, re.IGNORECASE) for host in hosts):
            return service
    return None
