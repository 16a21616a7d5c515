"""Holds the coverage of the product, room by room: `make check` runs it on what its tests have measured."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

#: Share of branches that must be covered, by folder: the rooms that decide, and everything outside the sandbox.
LEAST = {"worker/delivery": 0.95, "worker/state": 0.95, "worker/intake": 0.95, "": 0.90}
#: What runs on a developer's machine only.
OUTSIDE = "worker/sandbox"


def covered(files: dict[str, Any], folder: str) -> float:
    """The share of a folder's branches that some test has taken."""
    chosen = [
        file["summary"]
        for name, file in files.items()
        if name.startswith(folder) and not (name.startswith(OUTSIDE) and not folder)
    ]
    taken = sum(summary["covered_branches"] for summary in chosen)
    return float(taken / max(1, sum(summary["num_branches"] for summary in chosen)))


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "coverage.json"
        subprocess.run([sys.executable, "-m", "coverage", "json", "-q", "-o", str(report)], check=True)
        files = json.loads(report.read_text())["files"]
    good = True
    for folder, least in LEAST.items():
        share = covered(files, folder)
        good = good and share >= least
        mark = "✓" if share >= least else "✗ TOO LITTLE"
        print(f"{folder or 'all but the sandbox':<20} {share:6.1%} of branches, at least {least:.0%} {mark}")
    if not good:
        worst = sorted(files.items(), key=lambda item: item[1]["summary"]["percent_covered"])[:10]
        for name, file in worst:
            print(f"  {name}: lines {file['missing_lines']}, branches {file['missing_branches']}")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
