"""A directory that belongs to one sandbox at a time. Only a sandbox's own directory may be emptied."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from worker.errors import SandboxError


class DirectoryLock:
    """A directory that belongs to one sandbox; created if it does not exist, and marked as ours.

    The embedded server keeps the lock file open, too: while it runs, no other can start on its data, even if the process that
    started it was killed.
    """

    #: The file that marks a directory as a sandbox's; it holds the process ids of those that use it, the owner's first.
    MARKER = "imattr-sandbox"

    def __init__(self, directory: Path) -> None:
        """Raises `SandboxError` if the directory is in use, or cannot be used."""
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self.file = os.open(directory / self.MARKER, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise SandboxError(f"{directory} cannot be used: {error.strerror}") from None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pids = os.read(self.file, 4096).decode(errors="replace").split()
            os.close(self.file)
            raise SandboxError(_who_has(directory, pids)) from None
        self.note(())

    def note(self, parts: Iterable[int]) -> None:
        """Record the parts' process ids, in case they outlive their owner."""
        text = "".join(f"{pid}\n" for pid in (os.getpid(), *parts)).encode()
        os.pwrite(self.file, text, 0)
        os.truncate(self.file, len(text))

    def release(self) -> None:
        os.close(self.file)


def _who_has(directory: Path, pids: list[str]) -> str:
    owner, *parts = pids or ["?"]
    left = [pid for pid in parts if _runs(pid)]
    if _runs(owner) or not left:
        return f"already running in {directory}, pid {owner}"
    return (
        f"already running in {directory}: pid {owner} was killed and left its parts behind; "
        f"end them first: kill {' '.join(left)}"
    )


def _runs(pid: str) -> bool:
    with contextlib.suppress(ValueError, ProcessLookupError):
        with contextlib.suppress(PermissionError):
            os.kill(int(pid), 0)
        return True
    return False


def empty(directory: Path) -> None:
    """Delete what a sandbox left in its directory; raises `SandboxError` for any other directory."""
    try:
        if not directory.exists() or not any(directory.iterdir()):
            return
        if directory.is_symlink() or not (directory / DirectoryLock.MARKER).is_file():
            raise SandboxError(
                f"{directory} has files that no sandbox made: name a new directory, or empty it yourself"
            )
        DirectoryLock(directory).release()
        shutil.rmtree(directory)
    except OSError as error:
        raise SandboxError(f"{directory} cannot be emptied: {error.strerror}") from None
