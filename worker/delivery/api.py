"""The user-attribute API: one call at a time, prepared first, then sent in its slot.

    call = api.prepare_set(users)       # sign, encode, connect: if this fails, nothing was sent
    wait_for_the_slot()
    call.send()                         # one write
    answer = call.answer()              # one deadline

Facts: Tencent Cloud Chat documents 1047/37170 (`im_set_attr`), 1047/37171 (`im_remove_attr`), 1047/37169 (`im_get_attr`),
1047/37167 and 1047/37168 (attribute names), 1047/60565 (their twins under `timpush`), 1047/34620 (URL, parameters, HTTP status).
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterable, Sequence
from typing import Protocol
from urllib.parse import urlencode

from worker.delivery.answers import TOO_MANY_REQUESTS, Answer, NoReply, Reply, read_reply
from worker.delivery.connection import Exchange, HttpTransport, Transport
from worker.delivery.usersig import Signer, UserSig
from worker.models import Attributes, UserId

#: Path of each command, by the name of the API in the settings; the command's name is appended.
PATHS = {"chat": "v4/all_member_push/im_", "push": "v4/timpush/"}

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Call(Protocol):
    """A call that is ready to be sent."""

    def send(self) -> None:
        """Send it, in one write. Raises nothing: a failure is part of the answer."""

    def answer(self) -> Answer:
        """Wait for the answer. Raises nothing that the network or the API could cause."""

    def abandon(self) -> None:
        """Abandon the call unsent."""


class ChatApi:
    """Prepares API calls. Thread-safe."""

    def __init__(
        self,
        base_url: str,
        signer: Signer,
        *,
        sdkappid: int,
        identifier: str,
        api: str = "chat",
        connect_timeout: float = 3.05,
        read_timeout: float = 10.0,
        transport: Transport | None = None,
    ) -> None:
        """Timeouts in seconds. The API's own is 3 s, so `read_timeout` must be longer.

        `api` is a key of `PATHS`; `transport` replaces HTTP, for tests.
        """
        self._url = f"{base_url.rstrip('/')}/{PATHS[api]}"
        self._query = {"sdkappid": sdkappid, "identifier": identifier, "contenttype": "json"}
        self._signer = signer
        #: The longest that one call takes, in seconds, including connecting.
        self.longest_call = connect_timeout + read_timeout
        self._transport = transport or HttpTransport(
            connect_timeout=connect_timeout, read_timeout=read_timeout
        )

    def renew_signature(self) -> None:
        """Make a new UserSig, reading the key again."""
        self._signer.renew()

    def adopt_signature(self, issued: int) -> None:
        """Sign as of `issued` (seconds since 1970) if the current UserSig is older: the fleet found that one to be bad."""
        self._signer.adopt(issued)

    def prepare_set(self, users: Iterable[tuple[UserId, Attributes]]) -> Call | NoReply:
        """Prepare a call that sets attributes; returns `NoReply` if it cannot connect.

        Raises what reading the secret key raises.
        """
        return self._prepare("set_attr", {"UserAttrs": _entries(users)})

    def prepare_remove(self, users: Iterable[tuple[UserId, Sequence[str]]]) -> Call | NoReply:
        """Prepare a call that removes attributes by name."""
        return self._prepare("remove_attr", {"UserAttrs": _entries(users)})

    def prepare_get(self, users: Sequence[UserId]) -> Call | NoReply:
        """Prepare a call that reads what up to 100 users have."""
        return self._prepare("get_attr", {"To_Account": list(users)})

    def prepare_get_names(self) -> Call | NoReply:
        """Prepare a call that asks for the app's attribute names."""
        return self._prepare("get_attr_name", {})

    def prepare_set_names(self, names: Iterable[str], *, first: int = 0) -> Call | NoReply:
        """Prepare a call that adds attribute names to the app, numbered from `first`."""
        numbered = {str(number): name for number, name in enumerate(names, first)}
        return self._prepare("set_attr_name", {"AttrNames": numbered})

    def _prepare(self, command: str, body: object) -> Call | NoReply:
        usersig = self._signer.current()
        query = {**self._query, "usersig": usersig.text, "random": random.getrandbits(32)}
        url = f"{self._url}{command}?{urlencode(query)}"
        exchange = self._transport.prepare(url, _encode(body).encode())
        return exchange if isinstance(exchange, NoReply) else _SignedCall(exchange, usersig)


def _entries(users: Iterable[tuple[UserId, object]]) -> list[dict[str, object]]:
    return [{"To_Account": user, "Attrs": attrs} for user, attrs in users]


class _SignedCall:
    """A call over a transport, which remembers when it was signed."""

    def __init__(self, exchange: Exchange, usersig: UserSig) -> None:
        self._exchange, self._usersig = exchange, usersig
        self.send, self.abandon = exchange.send, exchange.abandon

    def answer(self) -> Answer:
        raw = self._exchange.read()
        if isinstance(raw, NoReply):
            if raw.http_status == TOO_MANY_REQUESTS:
                return Reply(TOO_MANY_REQUESTS, retry_after=raw.retry_after, signed_at=self._usersig.issued)
            return raw
        reply = read_reply(raw.body)
        if isinstance(reply, Reply):
            return dataclasses.replace(reply, date=raw.date, signed_at=self._usersig.issued)
        return reply
