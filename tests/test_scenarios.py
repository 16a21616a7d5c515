"""The stories, played in virtual time."""

import pytest

from tests.scenarios.__main__ import STORIES, play
from tests.schedules.wire import Wire


@pytest.mark.timeout(300)
@pytest.mark.parametrize("story", STORIES)
def test_the_fleet_lives_through(story: str, wire: Wire) -> None:
    play(wire, story, seed=2)
