"""One user: where each of its values is, and why the API has it or does not."""

from __future__ import annotations

from collections.abc import Iterator

from starlette.responses import Response

from worker.console.asked import Asked, BadRequest, Page
from worker.errors import InvalidUpdate
from worker.models import check_user
from worker.operate.kept import refused_facts
from worker.operate.why import Answer, explain, facts, refusals_of
from worker.state.users import UserState, look


def show(asked: Asked) -> Response:
    """What is known, without values."""
    return _show(asked, values=False)


def values(asked: Asked) -> Response:
    """The same with the values, at an operator's request."""
    asked.note("values_shown", page="user")
    return _show(asked, values=True)


def _show(asked: Asked, *, values: bool) -> Response:
    name = asked.given("user")
    if not name:
        return asked.page("user.html", user="", found=None)
    try:
        known = look(asked.shared.redis, asked.shared.keys, check_user(name))
    except InvalidUpdate as error:
        raise BadRequest(f"user {error.rule}") from None
    refused = refusals_of(asked.shared.redis, asked.shared.keys, name)
    state, remembered = asked.shared.look.now().state, asked.shared.settings.shadow_ttl
    answers = [(one, explain(known, one, state, refused, remembered)) for one in _names(known)]
    nothing: Answer | None = None if answers else explain(known, "anything", state, refused, remembered)
    return asked.page(
        "user.html",
        user=name,
        found=facts(known, values=values),
        answers=answers,
        nothing=nothing,
        refused=[refused_facts(one) for one in refused[:10]],
        values=values,
    )


def _names(known: UserState) -> Iterator[str]:
    """The attributes about which anything is known."""
    places = (known.pending, known.in_flight, known.delivered, known.dead)
    yield from sorted({name for place in places if place for name in place.values})


PAGES = (Page("/user", show), Page("/user", values, "operator", "POST"))
