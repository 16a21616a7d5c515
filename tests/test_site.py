"""The site: it builds without a warning, every link and picture in it leads somewhere, and nothing comes from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

from tests import docs

ROOT = Path(__file__).parent.parent
MKDOCS = ROOT / ".venv" / "site" / "bin" / "mkdocs"

pytestmark = pytest.mark.skipif(not MKDOCS.exists(), reason="needs `make site`")


class Page(HTMLParser):
    """What a page refers to, what it loads, and the places in it that can be referred to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if "id" in given:
            self.places.add(given["id"])
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(given["href"])
        elif given.get("src"):
            self.loads.append(given["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [MKDOCS, "build", "--strict", "--site-dir", target],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return target


def test_every_page_is_on_the_site(site: Path) -> None:
    for page in docs.DOCS.rglob("*.md"):
        place = page.relative_to(docs.DOCS).with_suffix("")
        assert (site / (place.parent if place.name == "README" else place) / "index.html").exists(), page


def test_every_link_and_picture_leads_somewhere_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    assert len(pages) > 50
    broken = []
    for path, page in pages.items():
        if path.name == "404.html":
            continue
        for url in page.loads + page.links:
            target, place = urldefrag(url)
            if target.startswith("data:"):
                continue
            if re.match(r"[a-z]+:", target):
                assert target.startswith("https://"), (path, url)
                assert url in page.links, f"{path} loads {url}"
                continue
            found = (path.parent / unquote(target)).resolve() if target else path
            found = found / "index.html" if found.is_dir() else found
            if not found.exists() or (place and found in pages and unquote(place) not in pages[found].places):
                broken.append(f"{path.relative_to(site)}: {url}")
    assert not broken


def test_styles_load_nothing_from_elsewhere(site: Path) -> None:
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style
