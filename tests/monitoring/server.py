"""A real Prometheus on the loopback interface, with the rules of this project played faster."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.monitoring import rules
from worker.sandbox.redis_server import free_port

#: Seconds between two scrapes, and between two evaluations of the rules.
INTERVAL = 1
#: Seconds that it may take to start.
PATIENCE = 30.0

Labels = tuple[tuple[str, str], ...]
#: Value by time, in seconds since 1970.
Samples = dict[float, float]


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A running one."""

    url: str

    def ask(self, path: str, **parameters: object) -> Any:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as reply:
            return json.load(reply)["data"]

    def now(self, expr: str, at: float) -> list[dict[str, str]]:
        """The labels of what an expression finds at a moment."""
        return [found["metric"] for found in self.ask("query", query=expr, time=at)["result"]]

    def over(self, expr: str, begin: float, end: float, step: float = INTERVAL) -> dict[Labels, Samples]:
        """What an expression finds over time, by labels."""
        found = self.ask("query_range", query=expr, start=begin, end=end, step=step)["result"]
        return {
            tuple(sorted(series["metric"].items())): {float(at): float(value) for at, value in series["values"]}
            for series in found
        }  # fmt: skip

    def broken_alerts(self) -> list[str]:
        """Alerts whose texts could not be made."""
        return [
            f"{alert['labels']['alertname']}: {text}"
            for alert in self.ask("alerts")["alerts"]
            for text in alert["annotations"].values()
            if "error" in text.lower() and "<" in text
        ]


@contextmanager
def prometheus(
    directory: Path, targets: Mapping[str, Sequence[str]], factor: int = rules.FACTOR
) -> Iterator[Prometheus]:
    """Run one that scrapes these targets, by job."""
    (directory / "rules.json").write_text(rules.faster_rules(factor), encoding="utf-8")
    config = {
        "global": {"scrape_interval": f"{INTERVAL}s", "scrape_timeout": f"{INTERVAL}s", "evaluation_interval": f"{INTERVAL}s"},
        "rule_files": ["rules.json"],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": list(found)}]} for job, found in targets.items()
        ],
    }  # fmt: skip
    (directory / "prometheus.json").write_text(json.dumps(config), encoding="utf-8")
    program = shutil.which("prometheus")
    if program is None:
        raise SystemExit("prometheus is not installed: Debian's package prometheus has it")
    url = f"http://127.0.0.1:{free_port()}"
    with (directory / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={directory / 'prometheus.json'}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address={url.removeprefix('http://')}",
                "--log.level=warn",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait(process, url, directory)
        yield Prometheus(url)
    finally:
        process.terminate()
        process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, directory: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/-/ready", timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise SystemExit(f"prometheus did not start: {(directory / 'prometheus.log').read_text()[-500:]}")
