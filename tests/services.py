"""Managed Redis services, imitated: a proxy in front of a real server that refuses what they refuse.

It speaks RESP2. A command that the service refuses goes on as a script that answers with the service's error, so answers
pass through unread, and in order, whatever the client pipelines.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Self

import hiredis

#: Commands of scripts that have no key.
KEYLESS = {"TIME", "INFO"}
#: A call whose key is literally one of KEYS; a few commands have a word before it.
_CALL = re.compile(r"redis\.p?call\(\s*'(\w+)'\s*,\s*(?:'[A-Z]+'\s*,\s*)?KEYS\[\d+\](?=\s*[,)])")
_KEYLESS_CALL = re.compile(rf"redis\.p?call\(\s*'(?:{'|'.join(KEYLESS)})'")

#: Every so many scripts, the server has forgotten the one that is asked for, as after a failover.
FORGETS_EVERY = 97


def complaint(script: str) -> str | None:
    """What a service says against a script that it checks by reading it, if anything."""
    rest = _KEYLESS_CALL.sub("", _CALL.sub("", script))
    if re.search(r"redis\.p?call", rest):
        return "ERR bad lua script for redis cluster, all the keys that the script uses should be passed using the KEYS array"
    if "KEYS" in rest:
        return "ERR bad lua script for redis cluster, KEYS should not be in expression"
    return None


@dataclass(frozen=True, slots=True)
class Profile:
    """What a service refuses."""

    name: str
    #: Commands, each by its first words.
    refused: frozenset[str] = frozenset()
    #: What it answers then.
    answer: str = "ERR unknown command '{}'"
    #: Whether MULTI must follow a WATCH.
    watch_first: bool = False
    #: Whether the keys of a script must be literally KEYS[1] and so on, and there must be one.
    reads_scripts: bool = False
    #: Most arguments of one command, 0 = no limit.
    most_arguments: int = 0
    #: Whether it is a cluster: the keys of a command are in one slot, and there is only database 0.
    is_cluster: bool = False
    #: Sections of INFO that have only their heading.
    hidden: frozenset[str] = frozenset()
    #: Further lines of INFO.
    says: str = ""


def _words(*commands: str) -> frozenset[str]:
    return frozenset(commands)


#: The services, by their documents; none of them was tried.
SERVICES = [
    # "Currently only supports the RESP2 protocol", from 6.2 to Valkey 8.
    Profile("TencentDB, standard", _words("HELLO 3")),
    # "Transactions must begin with WATCH"; no MEMORY and SLOWLOG in clusters.
    Profile("TencentDB, cluster", _words("HELLO 3", "MEMORY", "SLOWLOG"), watch_first=True, is_cluster=True),
    # The proxy of clusters, with script_check_enable at 1.
    Profile(
        "Alibaba Cloud Tair, cluster",
        _words("HELLO", "WAIT", "CLIENT ID"),
        reads_scripts=True,
        is_cluster=True,
    ),
    Profile("Aiven", _words("CONFIG", "ROLE", "CLUSTER", "ACL")),
    Profile("Amazon ElastiCache", _words("CONFIG")),
    # Refuses keys that were not declared, which a script with literal keys cannot have. So does Dragonfly.
    Profile(
        "Amazon ElastiCache Serverless",
        _words("CONFIG"),
        reads_scripts=True,
        most_arguments=3999,
        is_cluster=True,
    ),
    Profile("Amazon MemoryDB", _words("CONFIG"), is_cluster=True),
    # What is not listed is not permitted, such as CLIENT SETINFO.
    Profile(
        "Google Memorystore",
        _words("CONFIG", "CLIENT SETINFO"),
        "NOPERM this user has no permissions to run the '{}' command",
    ),
    Profile("Azure Managed Redis", _words("CONFIG")),
    Profile("Dragonfly", reads_scripts=True, says="dragonfly_version:df-v1.40.1\r\n"),
    # "A section name that is not supported produces only its heading."
    Profile("Upstash", hidden=_words("persistence", "replication"), says="upstash_version:1.10.5\r\n"),
]

#: Everything at once that any of them refuses.
STRICTEST = Profile(
    "all at once",
    frozenset().union(*(service.refused for service in SERVICES)) | _words("HELLO", "CLIENT", "SELECT"),
    watch_first=True,
    reads_scripts=True,
    most_arguments=3999,
    is_cluster=True,
    hidden=_words("persistence", "replication"),
)

#: It runs no scripts, so the product cannot work there, and must say so.
WITHOUT_SCRIPTS = Profile("OCI Cache, sharded", _words("EVAL", "EVALSHA", "SCRIPT"), is_cluster=True)


@dataclass(slots=True)
class Service:
    """The proxy; a context manager. `server` is the port of the real server."""

    profile: Profile
    server: int
    port: int = 0
    #: What was refused so far, by name.
    refusals: list[str] = field(default_factory=list)
    _listener: socket.socket = field(default_factory=socket.socket)
    _open: set[socket.socket] = field(default_factory=set)
    _scripts: int = 0

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def __enter__(self) -> Self:
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(64)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        # A shutdown wakes the thread that waits, which closing does not.
        for each in (self._listener, *list(self._open)):
            _shut(each)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self.server))
                for end in (client, server):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    self._open.add(end)
                for pump in (self._requests, self._answers):
                    threading.Thread(target=pump, args=(client, server), daemon=True).start()

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        reader, session = hiredis.Reader(), _Session(self)
        with contextlib.suppress(OSError):
            while received := client.recv(65_536):
                reader.feed(received)
                passed = []
                while (command := reader.gets()) is not False:
                    passed.append(hiredis.pack_command(tuple(session.passed(command))))
                server.sendall(b"".join(passed))
        _shut(server)

    def _answers(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while received := server.recv(65_536):
                client.sendall(received)
        _shut(client)
        for end in (client, server):
            self._open.discard(end)
            end.close()

    def forgets(self) -> bool:
        """Whether the script that is asked for now is forgotten."""
        self._scripts += 1
        return self._scripts % FORGETS_EVERY == 0


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


Command = Sequence[Any]


class _Session:
    """One client's connection."""

    def __init__(self, service: Service) -> None:
        self._service, self._profile = service, service.profile
        self._watches = False

    def passed(self, command: Sequence[bytes]) -> Command:
        """What goes to the server in place of the command."""
        words = [word.decode(errors="replace").upper() for word in command[:3]]
        if refusal := self._refusal(words, command):
            self._service.refusals.append(" ".join(words[:2]) if words[0] == "CLIENT" else words[0])
            return ("EVAL", "return redis.error_reply(ARGV[1])", "0", refusal)
        match words:
            case ["WATCH", *_]:
                self._watches = True
            case ["EXEC" | "DISCARD" | "UNWATCH"]:
                self._watches = False
            case ["EVALSHA", *_] if self._service.forgets():
                return (command[0], "0" * 40, *command[2:])
            case ["INFO", *_]:
                return self._info(command)
        return command

    def _refusal(self, words: Sequence[str], command: Sequence[bytes]) -> str | None:
        profile = self._profile
        for refused in (" ".join(words[:length]) for length in (1, 2)):
            if refused in profile.refused:
                return profile.answer.format(refused)
        if words[0] == "MULTI" and profile.watch_first and not self._watches:
            return "ERR transactions must begin with WATCH"
        if profile.most_arguments and len(command) > profile.most_arguments:
            return f"ERR Maximum number of arguments exceeded: {profile.most_arguments}"
        if profile.reads_scripts and words[0] in ("EVAL", "EVALSHA") and words[2] == "0":
            return "ERR for redis cluster, eval/evalsha number of keys can't be negative or zero"
        if profile.reads_scripts and (words[0] == "EVAL" or words[:2] == ["SCRIPT", "LOAD"]):
            return complaint(command[1 if words[0] == "EVAL" else 2].decode())
        return None

    def _info(self, command: Sequence[bytes]) -> Command:
        sections = [section.decode().lower() for section in command[1:]]
        if len(sections) == 1 and sections[0] in self._profile.hidden:
            return ("EVAL", "return ARGV[1]", "0", f"# {sections[0].title()}\r\n")
        if not self._profile.says or sections not in ([], ["server"], ["all"]):
            return command
        script = "return redis.call('INFO', unpack(ARGV, 2)) .. '\\r\\n' .. ARGV[1]"
        return list(chain(("EVAL", script, "0", self._profile.says), command[1:] or ("default",)))
