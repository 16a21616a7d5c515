"""The files that an import writes beside its own: its progress, for the next run, and the refused lines, for people.

Both are written after each chunk that Redis has accepted, so nothing is left out. A process that is killed between the
two sends that one chunk again, which changes nothing: its updates have the same event times as before.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

from worker.errors import CannotImport
from worker.intake.import_source import Format
from worker.producer import Lane


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """What to import, and how. `path` None is stdin; `format` None is detected."""

    path: Path | None
    format: Format | None = None
    user_column: str = "user"
    #: The text that means no value in a cell of CSV, besides an empty cell.
    null: str | None = None
    lane: Lane = "backfill"
    as_of_ms: int | None = None
    refused: Path | None = None
    restart: bool = False
    #: The file for the progress, if not beside the imported one.
    progress: Path | None = None

    @property
    def resumable(self) -> bool:
        """Whether a later run can resume in the middle, which is impossible with a pipe."""
        return self.path is not None and self.path.is_file()

    @property
    def name(self) -> str:
        """What distinguishes this import from others of the app, in all its runs."""
        place = self.path.absolute() if self.path and self.resumable else f"pipe {os.getpid()}"
        return f"{socket.gethostname()}:{place}"

    @property
    def refused_path(self) -> Path:
        """Where the refused lines go."""
        return self.refused or self._beside("refused.jsonl")

    @property
    def progress_path(self) -> Path:
        """The file that says how far the import has come."""
        return self.progress or self._beside("import-progress")

    def _beside(self, suffix: str) -> Path:
        if self.path is None or not self.resumable:
            return Path(f"imattr-import.{suffix}")
        return self.path.with_name(f"{self.path.name}.{suffix}")


@dataclass(slots=True)
class Progress:
    """How far an import has come, in all its runs together.

    The next record begins after `line`, at `offset`. `accepted` is what Redis has accepted; `coalesced`, `unchanged` and
    `stale` are parts of it, as in the ledger.
    """

    as_of_ms: int
    line: int = 0
    offset: int = 0
    accepted: int = 0
    coalesced: int = 0
    unchanged: int = 0
    stale: int = 0
    refused: int = 0
    refused_bytes: int = 0

    @property
    def lines(self) -> int:
        """Updates read, valid or not; a header and blank lines do not count."""
        return self.accepted + self.refused


class Refusal(NamedTuple):
    """A refused update, and its line in the file."""

    line: int
    user: str
    rule: str


class ImportJournal:
    """Writes progress and refused lines, in an order in which a kill at any instant loses nothing and repeats no refusal."""

    def __init__(self, options: ImportOptions, identity: Mapping[str, object]) -> None:
        self._options, self._identity = options, identity
        self._refused: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._refused:
            self._refused.close()

    def begin(self, as_of_ms: int) -> Progress:
        """Return the place to resume at, or the beginning; raises `CannotImport` if something has changed since."""
        progress = self._read() or Progress(as_of_ms)
        self._forget_refusals_after(progress.refused_bytes)
        self._write(progress)
        return progress

    def keep(self, progress: Progress, refusals: Sequence[Refusal]) -> None:
        """Record what Redis has accepted, and what was refused."""
        if refusals:
            lines = [json.dumps(refusal._asdict(), ensure_ascii=False) + "\n" for refusal in refusals]
            packed = "".join(lines).encode()
            self._refused = self._refused or open(self._options.refused_path, "ab")  # noqa: SIM115
            self._refused.write(packed)
            self._refused.flush()
            progress.refused_bytes += len(packed)
        self._write(progress)

    def done(self) -> None:
        """Forget the progress: the whole file is accepted."""
        if self._options.resumable:
            self._options.progress_path.unlink()

    def _read(self) -> Progress | None:
        path = self._options.progress_path
        if not self._options.resumable or self._options.restart or not path.exists():
            return None
        try:
            kept = json.loads(path.read_bytes())
            progress = Progress(**kept["progress"])
            before = dict(kept["import"])
        except (ValueError, TypeError, KeyError):
            raise CannotImport(f"{path} is damaged; --restart starts over") from None
        changed = [what for what, value in self._identity.items() if before.get(what) != value]
        if self._options.as_of_ms not in (None, progress.as_of_ms):
            changed.append("as-of time")
        if changed:
            raise CannotImport(
                f"an import of this file stopped after line {progress.line:,}; to resume it, the {', the '.join(changed)} "
                "must be the same as then. To start over, use --restart, with "
                f"--as-of {progress.as_of_ms} if the file is as old as it was"
            )
        return progress

    def _write(self, progress: Progress) -> None:
        if self._options.resumable:
            path = self._options.progress_path
            new = path.with_name(f"{path.name}.new")
            new.write_text(json.dumps({"import": self._identity, "progress": asdict(progress)}))
            new.replace(path)

    def _forget_refusals_after(self, size: int) -> None:
        path = self._options.refused_path
        if not path.is_file():
            return
        if self._options.path and path.samefile(self._options.path):
            raise CannotImport("refused lines cannot go into the imported file itself")
        if size:
            os.truncate(path, min(size, path.stat().st_size))
        else:
            path.unlink()
