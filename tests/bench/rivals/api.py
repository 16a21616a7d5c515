"""The call that every contestant in Python makes: with our client, so that the HTTP side is equal for all."""

from __future__ import annotations

import os
from collections.abc import Mapping

from worker.delivery.answers import NoReply, Reply
from worker.delivery.api import ChatApi
from worker.delivery.usersig import Signer
from worker.models import Attributes, UserId

#: Calls a second that the API allows the app, and most users a call.
QUOTA, BATCH = int(os.environ.get("IMATTR_QUOTA", 100)), 100

#: redis://..., or redis+sentinel://HOST:PORT,HOST:PORT/SERVICE, which is how `limits` and `throttled-py` have it, too.
REDIS_URL = os.environ.get("IMATTR_REDIS_URL", "")

_app = int(os.environ.get("IMATTR_SDKAPPID", 0))
_client = ChatApi(
    os.environ.get("IMATTR_API_URL", ""),
    Signer(lambda: os.environ["IMATTR_SECRET_KEY"], "administrator", _app),
    sdkappid=_app,
    identifier="administrator",
)


class CallFailed(Exception):
    """Raised for a call that was refused (60007: over the quota) or not answered; it has to be made again."""


def call(users: Mapping[UserId, Attributes]) -> None:
    """Set these users' attributes with one call."""
    prepared = _client.prepare_set(users.items())
    if isinstance(prepared, NoReply):
        raise CallFailed(prepared.failure)
    prepared.send()
    answer = prepared.answer()
    if answer != Reply(0):
        raise CallFailed(f"code {answer.code}" if isinstance(answer, Reply) else answer.failure)
