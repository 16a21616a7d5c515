"""The README and the pages of `docs/`: every Python block runs, every link leads somewhere, the README stays short."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import docs
from worker.sandbox.redis_server import EmbeddedServer
from worker.state.keys import Keys

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
#: A block of Python, unless the line before says that it is a fragment.
BLOCK = re.compile(r"(<!-- no-run -->\n)?^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[str]:
    return [code for skipped, code in BLOCK.findall(page.read_text()) if not skipped]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_the_python_blocks_of_a_page_run_from_top_to_bottom(
    page: Path, server: EmbeddedServer, keys: Keys, tmp_path: Path
) -> None:
    code = "\n".join(blocks(page))
    code = code.replace("redis://redis:6379/0", server.url).replace("1400000000", str(keys.sdkappid))
    environ = {"PATH": os.environ["PATH"], "REDIS_URL": server.url, "SDKAPPID": str(keys.sdkappid)}

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr


def test_blocks_are_found() -> None:
    assert len(blocks(ROOT / "README.md")) == 2
    assert sum(len(blocks(page)) for page in PAGES) >= 6


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        file, _, anchor = target.partition("#")
        if "://" in target:
            assert target.startswith("https://"), target
            continue
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            assert anchor in [
                re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings
            ]


def test_the_readme_is_short_and_begins_with_the_two_commands() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()

    assert len(lines) <= 150
    assert [line.split("#")[0].strip() for line in lines[3:5]] == ["make run", "make test"]


def test_the_page_of_commands_is_what_they_say_of_themselves() -> None:
    assert docs.COMMANDS.read_text() == docs.commands(), "make docs"


def test_the_page_on_proof_has_all_planted_bugs() -> None:
    assert docs.PROOF.read_text() == docs.proof(), "make docs"
