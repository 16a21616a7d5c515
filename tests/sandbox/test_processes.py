"""The sandbox as a supervisor: a directory belongs to one, nothing of others is deleted, and ends are explained."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from worker.errors import SandboxError
from worker.sandbox import processes
from worker.sandbox.directory import DirectoryLock, empty
from worker.sandbox.processes import Plan, Sandbox
from worker.sandbox.redis_server import EmbeddedServer
from worker.state.connection import connect

pytestmark = pytest.mark.slow

ALONE = Plan(workers=0, flower=False)


def test_only_what_a_sandbox_has_made_is_deleted(tmp_path: Path) -> None:
    mine, ours, new = tmp_path / "mine", tmp_path / "ours", tmp_path / "new"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    DirectoryLock(ours).release()
    (ours / "worker-1.log").write_text("log")

    with pytest.raises(SandboxError, match="no sandbox made"):
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
        with pytest.raises(SandboxError, match="was killed and left its parts behind") as caught:
            DirectoryLock(tmp_path)
        assert {int(pid) for pid in str(caught.value).partition("kill ")[2].split()} == set(left)
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


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_parts_that_are_killed_come_back_where_they_were(tmp_path: Path) -> None:
    told: list[str] = []
    with Sandbox(tmp_path, {}, ALONE, tell=told.append) as sandbox:
        before = sandbox.pids()
        for pid in before.values():
            os.kill(pid, signal.SIGKILL)

        def are_back() -> bool:
            sandbox.check()
            return sum("is ready again" in text for text in told) == 2

        until(are_back)

        assert not set(before.values()) & set(sandbox.pids().values())
        assert urllib.request.urlopen(f"{sandbox.api_url}/simulator/state", timeout=10).status == 200
        with connect(sandbox.redis_url) as client:
            assert client.ping()
        noted = (tmp_path / DirectoryLock.MARKER).read_text().split()
        assert set(noted) == {str(pid) for pid in (os.getpid(), *sandbox.pids().values())}
    assert any("was ended by SIGKILL, and is started again in 1 s, see" in text for text in told)


def test_what_a_part_has_started_ends_with_it(tmp_path: Path) -> None:
    script = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '100']).pid, flush=True); time.sleep(100)"
    log = tmp_path / "log"
    part = processes.Process("part", ["-c", script], log=log, environ=os.environ, ready=lambda _: True)
    until(lambda: "\n" in part.said())

    part.kill()

    assert part.status() == -signal.SIGKILL
    until(lambda: not has_process(int(part.said())))


def has_process(pid: int) -> bool:
    """Whether it runs; in a container, nobody may wait for the processes of one that ended."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "zombie" not in status.read_text()


def test_a_stop_takes_its_time_even_if_redis_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without the look at Redis, this test would run into its timeout.
    monkeypatch.setattr(processes, "WORKERS_PATIENCE", 3600)
    monkeypatch.setattr(processes, "PARTS_PATIENCE", 1)
    told: list[str] = []
    with Sandbox(tmp_path, {}, Plan(workers=1, concurrency=2, flower=False), tell=told.append) as sandbox:
        pids = sandbox.pids()
        os.kill(pids["redis"], signal.SIGSTOP)
        os.kill(pids["worker-1"], signal.SIGSTOP)

    assert told[-1].startswith("Redis does not answer")
    assert not any(map(has_process, pids.values()))


def test_flower_asks_for_a_login_and_is_for_this_machine_only(tmp_path: Path) -> None:
    with Sandbox(tmp_path, {}, Plan(workers=0)) as sandbox:
        assert sandbox.flower_login
        user, password = sandbox.flower_login
        for login, status in ((None, 401), ((user, "wrong"), 401), ((user, password), 200)):
            assert requests.get(f"{sandbox.flower_url}/workers", auth=login, timeout=30).status_code == status
        # Whoever has logged in can look, and change nothing.
        shutdown = requests.post(
            f"{sandbox.flower_url}/api/worker/shutdown/worker-1", auth=(user, password), timeout=30
        )
        assert shutdown.status_code in (403, 405)
        pid = sandbox.pids()["flower"]
        assert password not in Path(f"/proc/{pid}/cmdline").read_text()
        assert sandbox.flower_url.startswith("http://127.0.0.1:")
        assert "--address=127.0.0.1" in Path(f"/proc/{pid}/cmdline").read_text()
        environ = Path(f"/proc/{pid}/environ").read_text().split("\0")
        assert not [text for text in environ if text.startswith("IMATTR_SECRET_KEY")]


def test_the_console_is_for_this_machine_only_and_has_no_key(tmp_path: Path) -> None:
    with Sandbox(tmp_path, {}, Plan(workers=0, flower=False, console=True)) as sandbox:
        assert sandbox.console_url.startswith("http://127.0.0.1:")
        assert "no worker is running" in requests.get(sandbox.console_url, timeout=30).text
        by_name = requests.get(sandbox.console_url, headers={"Host": "imattr.example"}, timeout=30)
        assert by_name.status_code == 421
        pid = sandbox.pids()["console"]
        assert "--host\x00127.0.0.1" in Path(f"/proc/{pid}/cmdline").read_text()
        environ = Path(f"/proc/{pid}/environ").read_text().split("\0")
        assert not [text for text in environ if text.startswith("IMATTR_SECRET_KEY")]


@pytest.fixture(autouse=True)
def signals_as_in_a_terminal() -> None:
    """What is started here must not inherit that signals are ignored, as under nohup or in the background of a script."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


UP = [
    sys.executable,
    "-m",
    "worker.cli",
    "up",
    "--workers",
    "0",
    "--no-flower",
    "--no-console",
    "--no-metrics",
]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_every_signal_that_asks_for_an_end_stops_everything(tmp_path: Path, number: signal.Signals) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("IMATTR_")}
    up = subprocess.Popen([*UP, "--directory", str(tmp_path)], env=environ, stdout=subprocess.PIPE, text=True)
    settings = tmp_path / "settings.env"
    until(settings.exists)
    pids = [int(pid) for pid in (tmp_path / DirectoryLock.MARKER).read_text().split()]
    assert len(pids) == 3
    assert settings.stat().st_mode & 0o777 == 0o600

    up.send_signal(number)
    said = up.communicate(timeout=60)[0]

    assert (up.returncode, said.splitlines()[-1]) == (0, "stopped")
    assert not any(map(has_process, pids))
    assert not settings.exists()


def test_a_part_that_cannot_stay_ends_everything_with_a_reason_and_6(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("IMATTR_")}
    environ["IMATTR_QUOTA"] = "many"

    done = subprocess.run(
        [*UP, "--directory", str(tmp_path)], env=environ, capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 6
    assert "simulator ended with status 2, see" in done.stderr
    assert "IMATTR_QUOTA must be a whole number" in done.stderr
    assert not (tmp_path / "settings.env").exists()


def test_a_server_says_how_it_ended(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path, persistent=False) as server:
        assert server.status() is None
        server.kill()
        assert server.status() == -signal.SIGKILL


@pytest.mark.parametrize("moment", ["generating events", "redis      ", "logs       "])
def test_a_demo_that_is_stopped_leaves_nothing_behind(tmp_path: Path, moment: str) -> None:
    command = [
        sys.executable,
        "-m",
        "worker.cli",
        "demo",
        "--workers",
        "1",
        "--no-flower",
        "--directory",
        str(tmp_path),
    ]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("IMATTR_")}
    demo = subprocess.Popen(
        command, env=environ | {"PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, text=True
    )
    assert demo.stdout
    next(line for line in demo.stdout if line.startswith(moment))

    demo.send_signal(signal.SIGINT)
    demo.communicate(timeout=60)

    assert demo.returncode == 130
    marker = tmp_path / DirectoryLock.MARKER
    pids = marker.read_text().split() if marker.exists() else []
    assert not any(has_process(int(pid)) for pid in pids)
