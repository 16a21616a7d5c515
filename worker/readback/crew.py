"""Several readers in parallel, since one that waits for its answer leaves the next slots unused.

A user can be compared with what was read only if nothing was on its way to the API meanwhile. So what is known about it is
looked up before and after reading: users in motion at either time, or delivered in between, are marked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import NamedTuple, Protocol, TypeVar

from worker.models import UserId
from worker.state.shadow import Known, Shadow

#: Readers of a plan. With answers in 150 ms, they use a hundred slots a second.
READERS = 16
#: Users a call.
USERS_PER_CALL = 100

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")


class Reads(Protocol):
    """See `worker.readback.reader.Reader`."""

    calls: int

    def read(self, users: Sequence[UserId]) -> Mapping[UserId, Mapping[str, str] | None]: ...


class Observation(NamedTuple):
    """What users have at the API. `at_ms` is Redis' clock before reading; nothing can be said about users in `moving`."""

    at_ms: int
    found: Mapping[UserId, Mapping[str, str] | None]
    known: Mapping[UserId, Known]
    moving: frozenset[UserId]

    def newest(self, user: UserId) -> dict[str, int]:
        """The version of each remembered value, in ms."""
        return {name: version for name, (_, version) in self.known[user].values.items()}


class Crew:
    """The readers of one run. Thread-safe."""

    def __init__(
        self,
        shadow: Shadow,
        build: Callable[[Callable[[], bool]], Reads],
        stopped: Callable[[], bool],
        *,
        readers: int = READERS,
    ) -> None:
        """`build` makes a reader from a function that says when it must give up."""
        self._shadow, self._stopped, self._failed = shadow, stopped, False
        self._readers = [build(self.is_over) for _ in range(readers)]
        self._free = SimpleQueue[Reads]()
        for reader in self._readers:
            self._free.put(reader)

    @property
    def calls(self) -> int:
        """Calls made so far."""
        return sum(reader.calls for reader in self._readers)

    def is_over(self) -> bool:
        """Whether the run was asked to end, or one of its readers has failed."""
        return self._failed or self._stopped()

    def observe(self, users: Sequence[UserId]) -> Observation:
        """Read up to `USERS_PER_CALL` users; raises what a reader raises."""
        reader = self._free.get()
        try:
            at_ms, before = self._shadow.look(users)
            found = reader.read(users)
            _, after = self._shadow.look(users)
        finally:
            self._free.put(reader)
        moving = {
            user
            for user in users
            if before[user].in_motion or after[user].in_motion or before[user].mark != after[user].mark
        }
        return Observation(at_ms, found, before, frozenset(moving))

    def each(
        self, work: Callable[[Chunk], Result], chunks: Iterable[Chunk]
    ) -> Generator[tuple[Chunk, Result]]:
        """Run `work` on several chunks at a time, and yield the results in order. Its exceptions pass through."""
        waiting = deque[tuple[Chunk, Future[Result]]]()
        with ThreadPoolExecutor(len(self._readers)) as pool:
            try:
                for chunk in chunks:
                    waiting.append((chunk, pool.submit(work, chunk)))
                    # Twice as many as readers, so that others proceed while the first waits for a slow answer.
                    if len(waiting) >= 2 * len(self._readers):
                        yield waiting[0][0], waiting.popleft()[1].result()
                while waiting:
                    yield waiting[0][0], waiting.popleft()[1].result()
            except BaseException:
                # Running readers give up soon, and no more start.
                self._failed = True
                for _, future in waiting:
                    future.cancel()
                raise
