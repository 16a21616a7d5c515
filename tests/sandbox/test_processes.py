"""The sandbox as a supervisor: a directory belongs to one, nothing of others is deleted, and ends are explained."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from worker.errors import SandboxError
from worker.sandbox.processes import DirectoryLock, Plan, Sandbox, empty
from worker.sandbox.redis_server import EmbeddedServer

pytestmark = pytest.mark.slow

ALONE = Plan(workers=0, flower=False)


def test_only_what_a_sandbox_has_made_is_deleted(tmp_path: Path) -> None:
    mine, ours, new = tmp_path / "mine", tmp_path / "ours", tmp_path / "new"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    DirectoryLock(ours).release()
    (ours / "worker-1.log").write_text("log")

    with pytest.raises(SandboxError, match="no sandbox has made"):
        empty(mine)
    empty(ours)
    empty(new)

    assert (mine / "thesis.txt").read_text() == "years of work"
    assert not ours.exists()


def test_what_a_link_points_to_is_not_deleted(tmp_path: Path) -> None:
    DirectoryLock(tmp_path / "ours").release()
    (tmp_path / "ours" / "a.log").touch()
    (tmp_path / "link").symlink_to(tmp_path / "ours")

    with pytest.raises(SandboxError):
        empty(tmp_path / "link")

    assert (tmp_path / "ours" / "a.log").exists()


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")

    for use in (empty, DirectoryLock):
        with pytest.raises(SandboxError, match="cannot be"):
            use(tmp_path / "file")

    assert (tmp_path / "file").read_text() == "mine"


def test_a_directory_belongs_to_one_sandbox(tmp_path: Path) -> None:
    with Sandbox(tmp_path, {}, ALONE) as first:
        first.environ["mark"] = "first"
        with pytest.raises(SandboxError, match=f"already running in .*, pid {os.getpid()}"):
            Sandbox(tmp_path, {}, ALONE).__enter__()
        first.check()
    with Sandbox(tmp_path, {}, ALONE):
        pass


def test_data_stay_locked_while_their_server_runs_even_if_its_owner_was_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path\n"
        "from worker.sandbox.processes import *\n"
        "box = Sandbox(Path(sys.argv[1]), {}, Plan(workers=0, flower=False)); box.__enter__()\n"
        "print(box.pids()['redis'], box.pids()['simulator'], flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    assert owner.stdout
    with owner.stdout as said:
        left = [int(pid) for pid in said.readline().split()]
    try:
        owner.kill()
        owner.wait()
        with pytest.raises(SandboxError, match="already running"):
            DirectoryLock(tmp_path)
    finally:
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while True:
        try:
            DirectoryLock(tmp_path).release()
            break
        except SandboxError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.parametrize("part", ["simulator", "redis"])
def test_the_end_of_a_part_is_told_with_how_and_where(tmp_path: Path, part: str) -> None:
    with Sandbox(tmp_path, {}, ALONE) as sandbox:
        os.kill(sandbox.pids()[part], signal.SIGKILL)
        time.sleep(0.2)
        with pytest.raises(SandboxError, match=rf"(?i){part} was ended by SIGKILL, see .*log"):
            sandbox.check()


def test_somebody_in_a_hurry_need_not_wait(tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path, {}, ALONE, impatient=lambda: True)
    with sandbox:
        os.kill(sandbox.pids()["simulator"], signal.SIGSTOP)
        began = time.monotonic()

    assert time.monotonic() - began < 10


def test_a_server_says_how_it_ended(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path, persistent=False) as server:
        assert server.status() is None
        server.kill()
        assert server.status() == -signal.SIGKILL
