"""What a terminal and a browser show of a real sandbox.

`imattr status` while a backlog is delivered, and Flower's tasks after some went well and others did not; the latter needs
Chromium.
"""

from __future__ import annotations

import io
import re
import subprocess
import tempfile
import time
from pathlib import Path

import requests
from rich.console import Console
from rich.text import Text

from worker.cli.status import status_table
from worker.config import Settings
from worker.operate import status
from worker.producer import Producer
from worker.sandbox.processes import SDKAPPID, Plan, Sandbox
from worker.state.connection import connect

COMMAND = "imattr status --watch"
#: Users of the backlog, and seconds until the picture is taken: in the middle of it.
USERS, AFTER = 150_000, 12.0


def terminal() -> str:
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


def flower(target: Path) -> None:
    """Let calls succeed, fail for one user, fail for a while and then stop the line, and take Flower's page of tasks."""
    plan = Plan(workers=2, concurrency=4, names=("city",), persistent=False, login=False)
    with tempfile.TemporaryDirectory() as directory, Sandbox(Path(directory), {}, plan) as sandbox:
        producer = Producer(sandbox.redis_url, int(SDKAPPID), timeout=10)

        def faults(*faults: dict[str, object]) -> None:
            requests.post(f"{sandbox.api_url}/simulator/faults", json=faults, timeout=10).raise_for_status()

        producer.set_many((f"user{number}", {"city": "Shenzhen"}) for number in range(1500))
        time.sleep(2)
        faults({"kind": "user_code", "user": "stranger", "code": 70107, "times": None})
        producer.set("stranger", {"city": "Shenzhen"})
        time.sleep(1)
        faults({"kind": "status", "code": 502, "times": 2})
        producer.set_many((f"user{number}", {"city": "Oslo"}) for number in range(150))
        time.sleep(1)
        faults({"kind": "code", "code": 90009, "times": None})
        producer.set("user1", {"city": "Rome"})
        time.sleep(2)
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", "--virtual-time-budget=8000"]
        page = f"{sandbox.flower_url}/tasks"
        command = ["chromium", *options, "--window-size=1150,640", f"--screenshot={target}", page]
        subprocess.run(command, check=True, timeout=120, capture_output=True)
