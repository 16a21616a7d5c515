"""Real fleets of Redis servers on free ports: a primary with replicas and sentinels, and a cluster."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import redis
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.retry import Retry

from tests.chaos.proxy import Proxy
from tests.test_end_to_end import wait_until
from worker.sandbox.redis_server import find_server, free_port

SERVICE = "imattr"
#: Milliseconds without an answer after which sentinels, and cluster nodes, call a server down.
DOWN_AFTER = 1000


class Node:
    """One server, or sentinel: started, killed, suspended and started again on the same port, with the same data."""

    def __init__(self, directory: Path, port: int, *arguments: str, proxy: Proxy | None = None) -> None:
        """Everybody else connects through the `proxy`, if there is one."""
        directory.mkdir(parents=True, exist_ok=True)
        self.port, self.directory, self._arguments = port, directory, arguments
        self.proxy, self.public = proxy, proxy.port if proxy else port
        self._suspended = False
        self.start()

    def start(self) -> None:
        with (self.directory / "server.log").open("a") as log:
            self._process = subprocess.Popen(
                [find_server(), *self._arguments],
                stdout=log,
                stderr=log,
                cwd=self.directory,
                start_new_session=True,
            )
        wait_until(self._answers)

    def _answers(self) -> bool:
        assert self._process.poll() is None, (self.directory / "server.log").read_text()[-2000:]
        with contextlib.suppress(redis.ConnectionError, redis.TimeoutError):
            return bool(self.client().ping())
        return False

    def client(self) -> Any:
        retry = Retry(NoBackoff(), 0)
        return redis.Redis(port=self.port, socket_timeout=2, retry=retry, protocol=2)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def awake(self) -> bool:
        return self.alive and not self._suspended

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        """Kill it for good, awake or not."""
        self.kill()
        if self.proxy:
            self.proxy.__exit__(None, None, None)

    def suspend(self) -> None:
        self._suspended = True
        os.kill(self._process.pid, signal.SIGSTOP)

    def wake(self) -> None:
        self._suspended = False
        os.kill(self._process.pid, signal.SIGCONT)


def _server(directory: Path, port: int, *more: str, proxied: bool = False) -> Node:
    settings = [
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--appendonly",
        "yes",
        "--appendfsync",
        "everysec",
    ]
    settings += ["--repl-diskless-sync-delay", "0"]
    proxy = Proxy(free_port(), port) if proxied else None
    if proxy:
        settings += ["--replica-announce-ip", "127.0.0.1", "--replica-announce-port", str(proxy.port)]
    return Node(directory, port, *settings, *more, proxy=proxy)


def is_primary(node: Node) -> bool:
    """Whether it believes so; not if it does not answer."""
    with contextlib.suppress(redis.RedisError):
        return bool(node.client().role()[0] == b"master")
    return False


class _Fleet:
    nodes: list[Node]
    url: str

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for node in self.nodes:
            node.end()


class SentinelFleet(_Fleet):
    """A primary with two replicas, and three sentinels that watch them."""

    def __init__(self, directory: Path, *options: str, proxied: bool = False) -> None:
        """`options` are more arguments of each server, which is behind a proxy if it is `proxied`."""
        self.servers = list[Node]()
        self.nodes = self.servers
        try:
            self._start(directory, options, proxied)
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def _start(self, directory: Path, options: Sequence[str], proxied: bool) -> None:
        leader: tuple[str, ...] = ()
        for _ in range(3):
            port = free_port()
            node = _server(directory / f"server-{port}", port, *leader, *options, proxied=proxied)
            self.servers.append(node)
            leader = ("--replicaof", f"127.0.0.1 {self.servers[0].public}")
        first = self.servers[0].public
        self.sentinels = list[Node]()
        for _ in range(3):
            self.sentinels.append(self._sentinel(directory, free_port(), first))
            self.nodes = [*self.servers, *self.sentinels]
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in self.sentinels)
        self.url = f"redis+sentinel://{hosts}/{SERVICE}/0"
        wait_until(self.is_whole, 30)

    @staticmethod
    def _sentinel(directory: Path, port: int, primary: int) -> Node:
        place = directory / f"sentinel-{port}"
        place.mkdir(parents=True)
        (place / "sentinel.conf").write_text(
            f"port {port}\nbind 127.0.0.1\n"
            f"sentinel monitor {SERVICE} 127.0.0.1 {primary} 2\n"
            f"sentinel down-after-milliseconds {SERVICE} {DOWN_AFTER}\n"
            f"sentinel failover-timeout {SERVICE} 3000\n"
        )
        return Node(place, port, str(place / "sentinel.conf"), "--sentinel")

    def is_whole(self) -> bool:
        """Whether both replicas follow the primary, every sentinel knows it, and no failover is under way.

        The servers themselves are asked: what a sentinel says of a replica may be 10 s old.
        """
        states = [node.client().sentinel_master(SERVICE) for node in self.sentinels]
        if any(
            state["num-slaves"] != 2
            or state["num-other-sentinels"] != 2
            or {"s_down", "o_down", "failover_in_progress"} & set(state["flags"].split(","))
            for state in states
        ):
            return False
        [primary, *others] = {int(state["port"]) for state in states}
        roles = {node.public: node.client().role() for node in self.servers}
        return not others and all(
            role[0] == b"master" if port == primary else role[2:4] == [primary, b"connected"]
            for port, role in roles.items()
        )

    def primary(self, key: str = "") -> Node:
        """The server that the sentinels name now; it has every key."""
        _, port = self.sentinels[0].client().sentinel_get_master_addr_by_name(SERVICE)
        found: Node = next(node for node in self.servers if node.public == int(port))
        return found

    def fail_over(self, key: str = "", how: Callable[[Node], None] | None = None) -> Node:
        """Do `how` to the primary, or ask for a failover; returns the new primary once it answers as one."""
        old = self.primary()
        if how:
            how(old)
        else:
            self.sentinels[0].client().execute_command("SENTINEL", "FAILOVER", SERVICE)
        wait_until(lambda: self.primary() is not old and is_primary(self.primary()), 30)
        return self.primary()

    def recover(self, seconds: float = 60) -> None:
        """Start what was killed, and wait until everything is in step."""
        for node in self.servers:
            if not node.alive:
                node.start()
        wait_until(self.is_whole, seconds)


class ClusterFleet(_Fleet):
    """Three primaries with a replica each."""

    def __init__(self, directory: Path) -> None:
        self.nodes = []
        try:
            self._start(directory)
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def _start(self, directory: Path) -> None:
        options = ("--cluster-enabled", "yes", "--cluster-node-timeout", str(2 * DOWN_AFTER))
        for _ in range(6):
            port = _cluster_port()
            self.nodes.append(_server(directory / f"node-{port}", port, *options))
        primaries, replicas = self.nodes[:3], self.nodes[3:]
        for number, node in enumerate(primaries):
            share = 16384 // 3 + 1
            node.client().execute_command(
                "CLUSTER", "ADDSLOTSRANGE", number * share, min(16383, (number + 1) * share - 1)
            )
        for node in self.nodes[1:]:
            node.client().execute_command("CLUSTER", "MEET", "127.0.0.1", self.nodes[0].port)
        wait_until(lambda: all(self._knows(node, 6) for node in self.nodes), 30)
        for primary, replica in zip(primaries, replicas, strict=True):
            id = primary.client().execute_command("CLUSTER", "MYID")
            wait_until(partial(self._follow, replica, id), 30)
        wait_until(self.is_whole, 30)
        self.url = "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    @staticmethod
    def _knows(node: Node, nodes: int) -> bool:
        return int(_cluster_info(node)["cluster_known_nodes"]) == nodes

    @staticmethod
    def _follow(replica: Node, id: bytes) -> bool:
        with contextlib.suppress(redis.ResponseError):
            return bool(replica.client().execute_command("CLUSTER", "REPLICATE", id))
        return False

    def is_whole(self) -> bool:
        return all(self._is_up(node) for node in self.nodes)

    def recover(self, seconds: float = 60) -> None:
        """Start what was killed, and wait until everything is in step."""
        for node in self.nodes:
            if not node.alive:
                node.start()
        wait_until(self.is_whole, seconds)

    @staticmethod
    def _is_up(node: Node) -> bool:
        state = _cluster_info(node)
        return (
            state["cluster_state"] == "ok"
            and node.client().info("replication").get("master_link_status", "up") == "up"
        )

    def primary(self, key: str) -> Node:
        """The primary that has the slot of `key`."""
        for node in self.nodes:
            if node.awake and is_primary(node):
                with contextlib.suppress(redis.RedisError):
                    node.client().type(key)
                    return node
        raise LookupError(key)

    def fail_over(self, key: str, how: Callable[[Node], None] | None = None) -> Node:
        """Do `how` to the primary of the key's slot, or ask its replica to take over; returns that one."""
        old = self.primary(key)
        if how:
            how(old)
        else:
            [replica] = [node for node in self.nodes if self._follows(node, old)]
            # On a busy machine the replica may give up.
            for _ in range(5):
                replica.client().execute_command("CLUSTER", "FAILOVER")
                with contextlib.suppress(AssertionError):
                    wait_until(lambda: self._other_primary(key, old) is not None, 6)
                    break
        wait_until(lambda: self._other_primary(key, old) is not None, 30)
        return self.primary(key)

    def reshard(self, key: str) -> Node:
        """Move the slot of `key` to another primary, a few keys at a time; returns that one."""
        slot, source = key_slot(key.encode()), self.primary(key)
        primaries = [node for node in self.nodes if node.awake and is_primary(node)]
        target = next(node for node in primaries if node is not source)
        ids = {node: node.client().execute_command("CLUSTER", "MYID") for node in (source, target)}
        target.client().execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source])
        source.client().execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target])
        while keys := source.client().execute_command("CLUSTER", "GETKEYSINSLOT", slot, 3):
            source.client().execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
        for node in (target, *(node for node in primaries if node is not target)):
            node.client().execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[target])
        return target

    def _other_primary(self, key: str, old: Node) -> Node | None:
        with contextlib.suppress(LookupError):
            found = self.primary(key)
            return found if found is not old else None
        return None

    @staticmethod
    def _follows(node: Node, primary: Node) -> bool:
        return node.awake and node.client().info("replication").get("master_port") == primary.port


def _cluster_info(node: Node) -> dict[str, str]:
    info = node.client().execute_command("CLUSTER", "INFO")
    if isinstance(info, dict):
        return {str(name): str(value) for name, value in info.items()}
    return dict(line.split(":") for line in info.decode().split())


def _cluster_port() -> int:
    # The cluster's bus listens 10,000 above.
    while (port := free_port()) > 55_000:
        pass
    return port
