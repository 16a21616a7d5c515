"""The stories, played in virtual time."""

import pytest
import redis

from tests.scenarios.__main__ import STORIES, play


@pytest.mark.timeout(300)
@pytest.mark.parametrize("story", STORIES)
def test_the_fleet_lives_through(story: str, client: redis.Redis) -> None:
    play(client, story, seed=2)
