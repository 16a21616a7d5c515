"""Builds the site together with mkdocs, which calls the functions here by their names: `make site`.

The pages of `docs/` are written for a reader of the repository, so their links lead to files. Those to other pages are followed as
they are; a link to a page at the top, such as the changelog, leads to a copy of it, and one to any other file becomes its name.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
#: Pages at the top that the site has, too, and where.
COPIED = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "LICENSE": "license.md",
}
#: The text and target of a link, or picture, and what follows `#`.
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)(#[^)\s]*)?\)")
#: What is no link: code.
CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def on_startup(command: str, dirty: bool) -> None:
    """Let the reference see the client under the name that it is installed with."""
    package = ROOT / "build" / "api" / "imattr"
    package.parent.mkdir(parents=True, exist_ok=True)
    if not package.is_symlink():
        package.symlink_to(os.path.relpath(ROOT / "worker", package.parent))


def on_files(files: Any, config: Any) -> Any:
    """Add the pages at the top."""
    for source, page in COPIED.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        if not source.endswith(".md"):
            text = f"# License\n\n```\n{text}```\n"
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links to files into links of the site."""
    here = page.file.src_uri
    source = next((source for source, copy in COPIED.items() if copy == here), f"docs/{here}")
    return with_links(markdown, source, here)


def with_links(markdown: str, source: str, here: str) -> str:
    """The Markdown of a page whose links lead somewhere on the site.

    `source` is where the page is in the repository, `here` where it is on the site.
    """

    def of_site(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        if "://" in target or target.startswith("mailto:"):
            return link[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if file in COPIED:
            found = COPIED[file]
        elif file == "README.md":
            found = "README.md"
        elif file.startswith("docs/"):
            found = file.removeprefix("docs/")
        else:
            name = text[1:-2]
            return name if name == f"`{name.strip('`')}`" else f"{name} (`{file}`)"
        return f"{text}{posixpath.relpath(found, posixpath.dirname(here) or '.')}{anchor})"

    pieces, end = [], 0
    for block in CODE.finditer(markdown):
        pieces += [LINK.sub(of_site, markdown[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*pieces, LINK.sub(of_site, markdown[end:])])
