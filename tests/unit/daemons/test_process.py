# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rootvisor.daemons.process import Daemon, DaemonError, find_program

SOURCE = Path(__file__).resolve().parents[3] / "src"


def shell(script: str, *fds: int) -> Daemon:
    return Daemon("testd", ["/bin/sh", "-c", script], fds)


def gone(pid: int) -> bool:
    """Ended; a zombie whose parent does not wait has ended too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while not gone(pid):
        assert time.monotonic() < deadline, f"process {pid} still lives"
        time.sleep(0.002)


def test_descriptors_are_numbered_from_three(tmp_path: Path) -> None:
    pipes = [os.pipe() for _ in range(3)]
    daemon = shell("echo a >&3; echo b >&4; echo c >&5", *(writer for _, writer in pipes))
    for (reader, _), text in zip(pipes, (b"a\n", b"b\n", b"c\n"), strict=True):
        daemon.await_readable(reader, 10)
        assert os.read(reader, 10) == text
    daemon.close()
    for reader, writer in pipes:
        os.close(reader)
        os.close(writer)


def test_no_other_descriptor_is_inherited() -> None:
    reader, writer = os.pipe()
    look = "import os; print(*os.listdir('/proc/self/fd'), file=open(3, 'w'))"
    daemon = Daemon("testd", [sys.executable, "-I", "-S", "-c", look], (writer,))
    os.close(writer)
    with os.fdopen(reader) as lines:
        seen = set(lines.read().split())
    daemon.close()
    # Whoever started the tests may have left some open for every program.
    plain = [sys.executable, "-I", "-S", "-c", look.replace("open(3, 'w')", "None")]
    always = subprocess.run(plain, close_fds=False, capture_output=True, text=True, check=True).stdout.split()
    assert seen - set(always) <= {"3", "4"}


def test_end_is_noticed_and_told_with_the_last_line() -> None:
    daemon = shell("echo one >&2; echo >&2; echo 'the reason' >&2; exit 3")
    reader, writer = os.pipe()
    with pytest.raises(DaemonError, match=r"^testd ended with status 3: the reason$"):
        daemon.await_readable(reader, 10)
    assert not daemon.alive
    assert daemon.obituary() == "testd ended with status 3: the reason"
    daemon.close()
    os.close(reader)
    os.close(writer)


def test_silence_is_an_error_in_time() -> None:
    daemon = shell("echo waiting >&2; exec sleep 60")
    reader, writer = os.pipe()
    with pytest.raises(DaemonError, match=r"testd does not answer within 0\.5 seconds"):
        daemon.await_readable(reader, 0.5)
    assert daemon.alive
    daemon.close()
    os.close(reader)
    os.close(writer)


def test_flood_of_messages_holds_nobody_up() -> None:
    daemon = shell("head -c 1000000 /dev/zero >&2 2>/dev/null; exit 5")
    deadline = time.monotonic() + 20
    while daemon.alive:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert daemon.status == 5
    daemon.close()


def test_close_lets_the_daemon_put_its_files_in_order(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    mark = tmp_path / "mark"
    daemon = shell(
        f"trap 'echo ordered >{mark}; exit' TERM; echo ready >&3; while :; do sleep 0.01; done", writer
    )
    daemon.await_readable(reader, 10)
    daemon.close()
    assert mark.read_text() == "ordered\n"
    os.close(reader)
    os.close(writer)


def test_close_kills_what_ignores_it_and_its_children() -> None:
    reader, writer = os.pipe()
    daemon = shell("trap '' TERM; sleep 60 & echo $! >&3; sleep 60", writer)
    daemon.await_readable(reader, 10)
    child = int(os.read(reader, 20))
    daemon.close(patience=0.05)
    wait_until_gone(daemon.pid)
    wait_until_gone(child)
    daemon.close()
    os.close(reader)
    os.close(writer)


def test_close_leaves_no_descriptor() -> None:
    shell("exit").close()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        shell("exec sleep 60").close()
        with pytest.raises(DaemonError):
            Daemon("testd", ["/nothing/there"])
    assert len(os.listdir("/proc/self/fd")) == before


def test_daemon_outlives_the_thread_that_asked_for_it() -> None:
    daemons: list[Daemon] = []
    thread = threading.Thread(target=lambda: daemons.append(shell("exec sleep 60")))
    thread.start()
    thread.join()
    time.sleep(0.05)
    assert daemons[0].alive
    daemons[0].close()


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv (util-linux) is not installed")
def test_daemon_is_killed_with_the_process_that_started_it() -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(SOURCE)!r})\n"
        "from rootvisor.daemons.process import Daemon\n"
        "import os\n"
        "r, w = os.pipe()\n"
        "d = Daemon('testd', ['/bin/sh', '-c', 'echo x >&3; exec sleep 60'], (w,))\n"
        "d.await_readable(r, 10)\n"
        "print(d.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert not gone(pid)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_until_gone(pid)


def test_missing_program_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DaemonError, match=r"^passt is missing; apt-get install passt$"):
        find_program("passt", "passt")
