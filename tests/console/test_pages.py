"""What each page shows."""

from __future__ import annotations

import pytest

from tests.console.conftest import Opened

PAGES = ("/", "/live", "/dead", "/refused", "/user", "/imports", "/history", "/settings")


@pytest.mark.parametrize("path", PAGES)
def test_a_page_of_an_app_of_which_nothing_is_known_is_shown(browser: Opened, path: str) -> None:
    answer = browser().get(path)

    assert answer.status_code == 200, answer.text
    assert "<h" in answer.text
