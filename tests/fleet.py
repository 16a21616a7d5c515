"""A whole fleet in virtual time: real scripts, real dispatcher, real delivery, the API's rules; no waiting.

Only three things are not the product's own: the clock, the network (a call goes straight to the simulator's
`Api`, and takes as long as the scenario says), and the broker (tickets wait in a list).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import redis

from tests.conftest import SECRET_KEY, new_keys
from tests.virtual import World, scripts_on
from worker.clock import Clock
from worker.delivery.answers import Answer, Failure, NoReply, Reply, read_reply
from worker.delivery.api import ChatApi
from worker.delivery.connection import RawAnswer
from worker.delivery.dispatcher import TERM, TURN, Dispatcher
from worker.delivery.loop import Delivery
from worker.delivery.meter import Summary
from worker.delivery.policy import Policy
from worker.delivery.usersig import Signer
from worker.models import Attributes, BatchId, Update
from worker.ratelimit import RateLimiter
from worker.sandbox.simulator import Api, Quirks
from worker.state import fleet as workers
from worker.state.attribute_names import AttributeNames
from worker.state.buffer import MAX_UPDATES_PER_ADD, Buffer, Snapshot
from worker.state.dead_letters import DeadLetters
from worker.state.keys import Keys
from worker.state.leader import Leader
from worker.state.line import Line, LineState

#: What the network or the service does to a request instead of answering by the rules; None = nothing.
Trouble = Callable[["Request"], Answer | None]


@dataclass(frozen=True, slots=True)
class Request:
    """One call as it arrives."""

    at: float
    command: str
    body: dict[str, Any]
    url: str
    raw: bytes

    @property
    def users(self) -> list[str]:
        return [entry["To_Account"] for entry in self.body.get("UserAttrs", [])]


@dataclass(frozen=True, slots=True)
class Limits:
    """The settings that matter here, with their defaults, as `worker/config.py` has them."""

    quota: int = 100
    #: Calls a second for reads alone; 0 = they share the quota.
    read_quota: int = 0
    batch_size: int = 100
    linger: float = 0.25
    patience: float = 2.0
    lease: float = 60.0
    hold: float = 5.0
    connect_timeout: float = 3.05
    read_timeout: float = 10.0
    max_attempts: int = 8
    backoff_base: float = 1.0
    backoff_max: float = 300.0
    shadow_ttl: float = 10**6
    shadow_max_users: int = 1_000_000


#: Seconds between two turns of a dispatcher that finds nothing to do.
SLOWEST_TURN = 0.5


class StraightCall:
    """A request that goes straight to the simulator's rules; see `worker.delivery.connection.Exchange`."""

    def __init__(self, fleet: Fleet, url: str, body: bytes) -> None:
        self.fleet, self.url, self.body = fleet, url, body
        #: What happens to it on its way, for those who want to remember that.
        self.fault: str | None = None
        #: As it arrived, if it did.
        self.request: Request | None = None

    def send(self) -> None:
        self.fleet.send(self)

    def read(self) -> RawAnswer | NoReply:
        answer = self.fleet.read(self)
        return answer if isinstance(answer, NoReply) else RawAnswer(_packed(answer))

    def abandon(self) -> None:
        pass


def _packed(reply: Reply) -> bytes:
    """The body that says what a reply says."""
    errors = [
        {"To_Account": user, "ErrorCode": error.code, "ErrorInfo": error.info}
        for user, error in reply.errors.items()
    ]
    answer = {
        "ActionStatus": "FAIL" if reply.code else "OK",
        "ErrorCode": reply.code,
        "ErrorInfo": reply.info,
        "ErrorList": errors,
        "AttrNames": {str(number): name for number, name in enumerate(sorted(reply.names))},
        "UserAttrs": [{"To_Account": user, "Attrs": attrs} for user, attrs in reply.values.items()],
    }
    return json.dumps(answer).encode()


class StraightTransport:
    """The simulator's rules in place of the network."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def prepare(self, url: str, body: bytes) -> StraightCall | NoReply:
        call = StraightCall(self._fleet, url, body)
        return self._fleet.prepare(call) or call


@dataclass
class Fleet:
    """Worker processes that share an app, and the API they call."""

    redis: redis.Redis
    world: World
    api: Api
    buffer: Buffer
    line: Line
    letters: DeadLetters
    names: AttributeNames
    limits: Limits = Limits()
    latency: float = 0.05
    #: The secret key that the workers have; changing it is like changing the file it is in.
    key: str = SECRET_KEY
    trouble: Trouble = lambda _: None
    #: Seconds for which a thread stands still between its last look at the clock and the socket.
    stall: Callable[[], float] = lambda: 0.0
    summaries: list[Summary] = field(default_factory=list)
    tickets: list[BatchId] = field(default_factory=list)
    #: How many tickets there have been.
    issued: int = 0
    requests: list[Request] = field(default_factory=list)
    #: The answers that were errors, by the request they answer.
    errors: list[tuple[Request, int]] = field(default_factory=list)
    #: What the line was, each time it became something else.
    history: list[LineState] = field(default_factory=list)

    # One call over the network that is not there.

    def prepare(self, call: StraightCall) -> NoReply | None:
        """Connect; returns why that is not possible."""
        return None

    def send(self, call: StraightCall) -> None:
        """The request leaves."""
        self.world.sleep(self.stall())
        call.request = self.arrive(call.url, call.body)

    def read(self, call: StraightCall) -> Answer:
        """The answer comes back."""
        request = call.request
        assert request
        answer = self.trouble(request)
        if answer is None:
            answer = self.answer(request)
        if isinstance(answer, Reply) and answer.code:
            self.errors.append((request, answer.code))
        slow = isinstance(answer, NoReply) and answer.failure is Failure.TIMEOUT
        self.world.sleep(13.0 if slow else self.latency)
        return answer

    def arrive(self, url: str, body: bytes | str) -> Request:
        """A request reaches the API, whatever becomes of it."""
        now = self.world.monotonic()
        raw = body if isinstance(body, bytes) else body.encode()
        path = urlsplit(url).path
        request = Request(now, path.rpartition("/")[2], json.loads(raw), url, raw)
        self.requests.append(request)
        self.api.arrive(path, now)
        self.api.counts.requests += 1
        return request

    def answer(self, request: Request, **how: Any) -> Answer:
        """What the API says by its rules; `how` as in `Api.handle`."""
        parts = urlsplit(request.url)
        reply = self.api.handle(parts.path, dict(parse_qsl(parts.query)), request.raw, request.at, **how)
        return read_reply(json.dumps(reply).encode())

    def start_worker(self, number: int, threads: int) -> None:
        """One process: a delivery loop for each thread, and a dispatcher."""
        delivery = self.new_delivery(self.world, random.Random(number))
        for _ in range(threads):
            self.world.spawn(lambda: self._deliver_for_ever(delivery))
        dispatcher = self.new_dispatcher(f"w{number}")
        self.world.spawn(lambda: self._dispatch_for_ever(dispatcher))

    def new_delivery(
        self,
        clock: Clock,
        rng: random.Random,
        stopping: Callable[[], bool] = lambda: False,
        settings: tuple[int, float] | None = None,
    ) -> Delivery:
        """The delivery loop of one process; `settings` are its quota and patience, if not those of all."""
        limits, keys = self.limits, self.buffer._keys
        quota, patience = settings or (limits.quota, limits.patience)
        reads = RateLimiter(
            self.redis, keys, quota=limits.read_quota, patience=patience, clock=clock, apart=True
        )
        return Delivery(
            self.buffer,
            RateLimiter(self.redis, keys, quota=quota, patience=patience, clock=clock),
            self.line,
            self.names,
            self.new_api(),
            Policy(
                max_attempts=limits.max_attempts,
                backoff_base=limits.backoff_base,
                backoff_max=limits.backoff_max,
                hold=limits.hold,
            ),
            clock,
            batch_size=limits.batch_size,
            lease=limits.lease,
            quota=quota,
            rng=rng,
            stopping=stopping,
            reads=reads if limits.read_quota else None,
        )

    def new_api(self) -> ChatApi:
        """The API as one process calls it."""
        sdkappid, limits = self.api.sdkappid, self.limits
        return ChatApi(
            "http://api",
            Signer(lambda: self.key, "administrator", sdkappid, now=self.world.wall),
            sdkappid=sdkappid,
            identifier="administrator",
            connect_timeout=limits.connect_timeout,
            read_timeout=limits.read_timeout,
            transport=StraightTransport(self),
        )

    def new_dispatcher(self, worker: str) -> Dispatcher:
        """The dispatcher of one process."""
        limits = self.limits
        leader = Leader(self.redis, self.buffer._keys.dispatcher, worker, self.world, term=TERM)
        return Dispatcher(
            leader,
            self.buffer,
            workers.Fleet(self.redis, self.buffer._keys),
            self._publish,
            batch_size=limits.batch_size,
            linger=limits.linger,
            quota=limits.quota,
        )

    def _deliver_for_ever(self, delivery: Delivery) -> None:
        while True:
            while not self.tickets:
                self.world.park()
            self.summaries += delivery.carry(self.tickets.pop(0))
            if self.summaries[-1].outcome == "stopped":
                self.history.append(self.line.read())

    def _dispatch_for_ever(self, dispatcher: Dispatcher) -> None:
        # Ever more slowly while there is nothing to do: turns that find nothing would be most of a long story's cost.
        wait, issued = TURN, 0
        while True:
            pause = dispatcher.turn()
            wait = TURN if self.issued != issued else min(1.5 * wait, SLOWEST_TURN)
            issued = self.issued
            self.world.sleep(max(pause, wait))

    def _publish(self, ticket: BatchId) -> None:
        self.issued += 1
        self.tickets.append(ticket)
        self.world.unpark()

    # What scenarios do and ask.

    def add(self, users: Iterable[str], attrs: Attributes | None = None) -> None:
        """Accept one update for each user."""
        updates = [Update(user, attrs or {"city": "Paris"}) for user in users]
        for first in range(0, len(updates), MAX_UPDATES_PER_ADD):
            self.buffer.add(updates[first : first + MAX_UPDATES_PER_ADD])

    def wait(self, seconds: float) -> None:
        self.world.sleep(seconds)

    def wait_until(self, condition: Callable[[], bool], seconds: float, *, step: float = 0.05) -> float:
        """Let time pass until it is so; returns how long it took, and fails after `seconds`."""
        start = self.world.monotonic()
        while not condition():
            waited = self.world.monotonic() - start
            assert waited < seconds, "it did not happen in time"
            # To one percent: looking is most of what a long wait costs.
            self.world.sleep(max(step, waited / 100))
        return self.world.monotonic() - start

    def replicate(self) -> dict[str, bytes]:
        """What a replica has at this moment."""
        copy: dict[str, Any] = {key: self.redis.dump(key) for key in _all_keys(self.buffer._keys)}
        return {key: packed for key, packed in copy.items() if packed}

    def promote(self, copy: dict[str, bytes]) -> None:
        """That replica becomes the primary: everything since is gone, and scripts see another server's id."""
        self.redis.unlink(*_all_keys(self.buffer._keys))
        for key, packed in copy.items():
            self.redis.restore(key, 0, packed)
        self.redis.hset(self.buffer._keys.server, "id", "another one")

    def snapshot(self) -> Snapshot:
        return self.buffer.snapshot()

    def drained(self) -> bool:
        snapshot = self.snapshot()
        return not snapshot.pending and not snapshot.in_flight

    def calls(self, command: str = "im_set_attr", since: float = 0.0, until: float = 1e12) -> int:
        """How many calls arrived in a stretch of time."""
        return sum(r.command == command and since <= r.at < until for r in self.requests)

    def refusals(self, code: int) -> list[Request]:
        """The calls answered with this code."""
        return [request for request, found in self.errors if found == code]

    def stopped_for(self) -> list[str]:
        """Why the line was stopped, each reason once."""
        return list(dict.fromkeys(state.reason for state in self.history if state.reason))

    def attempts_used(self) -> int:
        """Most attempts that any user had used up when it was sent again."""
        return max((summary.attempt - 1 for summary in self.summaries if summary.users), default=0)

    def dead(self) -> set[str]:
        return {letter.user for letter in self.letters.find()}


def _all_keys(keys: Keys) -> list[str]:
    names = [name for name, kept in vars(Keys).items() if isinstance(kept, property) and name != "pattern"]
    return [*(getattr(keys, name) for name in names), f"{keys.dispatcher}:ends"]


@contextmanager
def fleet(
    client: redis.Redis,
    *,
    seed: int = 1,
    workers: int = 2,
    threads: int = 8,
    names: tuple[str, ...] = ("city",),
    limits: Limits | None = None,
) -> Iterator[Fleet]:
    """A fleet that runs until the end of the block; afterwards everything it holds must be in order."""
    world, keys = World(seed), new_keys()
    with scripts_on(world.us):
        api = Api(keys.sdkappid, SECRET_KEY, names=names, quirks=Quirks(), wall=world.wall)
        buffer = Buffer(client, keys, shadow_ttl=10**6)
        running = Fleet(
            client,
            world,
            api,
            buffer,
            Line(client, keys),
            DeadLetters(client, keys),
            AttributeNames(client, keys, world),
            limits or Limits(),
        )
        for number in range(workers):
            running.start_worker(number, threads)
        try:
            yield running
            check(running)
        finally:
            world.end()


def check(running: Fleet) -> None:
    """What holds whatever happens: the ledger balances, the quota is kept, calls are well formed."""
    assert running.snapshot().balanced
    assert running.api.arrivals.worst <= 100
    assert running.api.counts.oversized == running.api.counts.repeated_users == 0
