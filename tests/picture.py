"""Takes the README's picture, of `imattr status` in a sandbox that delivers a backlog: `python -m tests.picture`."""

from __future__ import annotations

import io
import re
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

from worker.cli.status import status_table
from worker.config import Settings
from worker.operate import status
from worker.producer import Producer
from worker.sandbox.processes import SDKAPPID, Plan, Sandbox
from worker.state.connection import connect

PICTURE = Path(__file__).parent.parent / "docs" / "status.svg"
COMMAND = "imattr status --watch"
#: Users of the backlog, and seconds until the picture is taken: in the middle of it.
USERS, AFTER = 60_000, 4.0


def take() -> str:
    """Let two workers deliver a backlog, and return the status in the middle of it, as SVG."""
    environ: dict[str, str] = {}
    plan = Plan(workers=2, flower=False, names=("city", "level"), persistent=False)
    with tempfile.TemporaryDirectory() as directory, Sandbox(Path(directory), environ, plan) as sandbox:
        producer = Producer(sandbox.redis_url, int(SDKAPPID), timeout=10)
        for value in ("Silver", "Gold"):
            producer.set_many((f"user{number}", {"level": value}) for number in range(USERS // 4))
        producer.set_many((f"user{number}", {"city": "Shenzhen", "level": "Gold"}) for number in range(USERS))
        time.sleep(AFTER)
        with connect(sandbox.redis_url) as redis:
            state = status.read(redis, Settings.from_env(environ, "producer"))
    console = Console(
        record=True, width=80, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    console.print(Text(f"$ {COMMAND}", style="bold"))
    console.print(status_table(state))
    picture = console.export_svg(title="imattr")
    # Nothing is loaded from elsewhere: the fonts of the reader's machine will do.
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)
    return re.sub(r"<!-- Generated with .*?-->\s*", "", picture).replace("Fira Code", "monospace")


if __name__ == "__main__":
    PICTURE.write_text(take(), encoding="utf-8")
