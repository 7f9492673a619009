# SPDX-License-Identifier: Apache-2.0
"""Boots guests one after the other, or several at once, where the accelerator is: ``python -I -S inner.py JOB``.

JOB is a JSON file that `job` wrote:

    guests      list of {name, argv, expected: {key: value}, timeout_s}
    parallel    how many run at the same time
    page, port  what the server in here serves, and on which port of 127.0.0.1
    mshv        whether /dev/mshv is used: then the root's log and its partitions are looked at as well
    policy      the scheduling policy that QEMU gets (SCHED_FIFO, SCHED_RR), or ""

Each line on standard output is a JSON document: {"boot": {...}} when a guest has ended, {"root": {...}} at the end.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from select import POLLIN, poll

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

KVM_MODEL = "the model for kvm"
"""Stands in a command line for what `processor_model` gives."""

_TAIL_BYTES = 6000
_DEBUGFS = "/sys/kernel/debug"


def spawn(argv: list[str]) -> tuple[int, int, int]:
    """Start a program in a process group of its own, without input: its pid, and where to read its standard output and
    standard error."""
    output_read, output_write = os.pipe2(os.O_CLOEXEC)
    error_read, error_write = os.pipe2(os.O_CLOEXEC)
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    pid = os.posix_spawn(
        argv[0],
        argv,
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, null, 0),
            (os.POSIX_SPAWN_DUP2, output_write, 1),
            (os.POSIX_SPAWN_DUP2, error_write, 2),
        ],
        setpgroup=0,
    )
    for fd in (null, output_write, error_write):
        os.close(fd)
    return pid, output_read, error_read


class Boot:
    """One guest while it runs: its process, what it has printed, what it has said."""

    def __init__(self, guest: dict[str, Any], policy: str = "") -> None:
        self.guest = guest
        self.started = time.monotonic()
        self.deadline = self.started + guest["timeout_s"]
        self.said: list[tuple[str, str]] = []
        self.times: dict[str, float] = {}
        self.problem: str | None = None
        self.text: dict[int, bytes] = {}
        self._line = b""
        self.status: int | None = None
        self.pid, self.console, self.errors = spawn(guest["argv"])
        if policy:
            os.sched_setscheduler(self.pid, getattr(os, policy), os.sched_param(1))
        self.text = {self.console: b"", self.errors: b""}

    def feed(self, fd: int, data: bytes) -> None:
        """Take output; a kernel that says it is lost is killed at once."""
        from rootvisor.peers.guest import FATAL, MARK

        self.text[fd] = (self.text[fd] + data)[-4 * _TAIL_BYTES :]
        if fd != self.console:
            return
        lines = (self._line + data).split(b"\n")
        self._line = lines.pop()
        for line in lines:
            if line.startswith(MARK):
                key, _, value = line[len(MARK) :].decode("utf-8", "replace").strip().partition(" ")
                self.said.append((key, value.strip()))
                self.times.setdefault(key, time.monotonic() - self.started)
            elif self.problem is None and (found := FATAL.search(line)):
                self.problem = found[0].decode("utf-8", "replace").strip()
                # the report that follows says where; then there is nothing to wait for
                self.deadline = min(self.deadline, time.monotonic() + 3.0)

    def expire(self) -> None:
        """The deadline is over."""
        if self.problem is None:
            last = self.said[-1][0] if self.said else "nothing"
            self.problem = f"did not end within {self.guest['timeout_s']:.0f} s (last word: {last})"
        self.kill()

    def kill(self) -> None:
        """End QEMU, however it is."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def close(self) -> dict[str, Any]:
        """Wait for the process; the boot's result."""
        from rootvisor.peers.guest import judge

        _, wait_status = os.waitpid(self.pid, 0)
        total = time.monotonic() - self.started
        status = os.waitstatus_to_exitcode(wait_status)
        problems = [self.problem] if self.problem else []
        if self.problem is None:
            if status:
                problems.append(f"{self.guest.get('vmm', 'QEMU')} ended with status {status}")
            if self.said or not status:
                problems += judge(self.said, self.guest["expected"])
        for fd in self.text:
            os.close(fd)
        tails = {
            name: self.text[fd][-_TAIL_BYTES:].decode("utf-8", "replace")
            for name, fd in (("console", self.console), ("stderr", self.errors))
        }
        return {
            "name": self.guest["name"],
            "ok": not problems,
            "problems": problems,
            "total_s": round(total, 3),
            "times": {key: round(value, 3) for key, value in self.times.items()},
            "said": self.said,
            **tails,
        }


def boot_all(guests: list[dict[str, Any]], parallel: int, report: Any, policy: str = "") -> None:
    """Run the guests, `parallel` at a time; `report` gets each result.

    With a `policy` for the real time a thread of QEMU is not interrupted by another one that has woken up. A
    processor's thread forgets that QEMU wants to stop it while it is not in RUN_VP (see hypervisor.root_reaction); so
    it waits there by the time the main thread, which a write of the guest has woken up, comes to that. By turns in
    slices of 3 ms it often does not: they are short where the processor is emulated.
    """
    waiting = list(reversed(guests))
    watched = poll()
    by_fd: dict[int, Boot] = {}
    running: dict[Boot, int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                boot = Boot(waiting.pop(), policy)
                running[boot] = len(boot.text)
                for fd in boot.text:
                    by_fd[fd] = boot
                    watched.register(fd, POLLIN)
            next_end = min(boot.deadline for boot in running)
            for fd, _event in watched.poll(max(0.0, next_end - time.monotonic()) * 1000 + 1):
                boot = by_fd[fd]
                data = os.read(fd, 65536)
                if data:
                    boot.feed(fd, data)
                    continue
                watched.unregister(fd)
                del by_fd[fd]
                running[boot] -= 1
                if not running[boot]:
                    del running[boot]
                    report(boot.close())
            now = time.monotonic()
            for boot in running:
                if now >= boot.deadline:
                    boot.expire()
                    boot.deadline = now + 60.0
    finally:
        for boot in running:
            boot.kill()


def serve(page: bytes, port: int) -> int:
    """A web server with one page on 127.0.0.1, in a process of its own; its id."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(64)
    child = os.fork()
    if child:
        listener.close()
        return child
    try:
        head = f"HTTP/1.0 200 OK\r\nContent-Length: {len(page)}\r\nConnection: close\r\n\r\n".encode()
        while True:
            connection, _ = listener.accept()
            try:
                connection.settimeout(30.0)
                request = b""
                while b"\r\n\r\n" not in request:
                    data = connection.recv(4096)
                    if not data:
                        break
                    request += data
                connection.sendall(head + page)
            except OSError:
                pass  # a guest that was killed meanwhile
            finally:
                connection.close()
    finally:
        os._exit(0)


def bring_up_loopback() -> None:
    """Set `lo` up with its address: in a fresh Linux it is not."""
    import fcntl
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        name = b"lo".ljust(16, b"\0")
        address = struct.pack("=16sHH4s8x", name, socket.AF_INET, 0, bytes((127, 0, 0, 1)))
        try:
            fcntl.ioctl(control, 0x8916, address)  # SIOCSIFADDR
            fcntl.ioctl(
                control, 0x8914, struct.pack("=16sH14x", name, 0x49)
            )  # SIOCSIFFLAGS: up, loopback, running
        except PermissionError:
            pass  # not root here: then it is up already


class KernelLog:
    """This kernel's log from now on."""

    def __init__(self) -> None:
        try:
            self._fd: int | None = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)
        except OSError:
            self._fd = None

    def complaints(self) -> list[str]:
        """What it said that no kernel should say, since the last call."""
        from rootvisor.peers.guest import COMPLAINT

        found = []
        while self._fd is not None:
            try:
                record = os.read(self._fd, 8192)
            except BrokenPipeError:
                continue  # records were overwritten
            except OSError:
                break
            text = record.partition(b";")[2].split(b"\n")[0]
            if COMPLAINT.search(text):
                found.append(text.decode("utf-8", "replace"))
        return found


def partitions() -> list[str] | None:
    """Ids of the child partitions that the root's driver has; None where debugfs does not say."""
    folder = f"{_DEBUGFS}/mshv/partition"
    if not os.path.isdir(f"{_DEBUGFS}/mshv"):
        from subprocess import DEVNULL, run

        run(["mount", "-t", "debugfs", "debugfs", _DEBUGFS], stderr=DEVNULL, check=False)
    try:
        return sorted(name for name in os.listdir(folder) if name.isdigit() and name != "1")
    except OSError:
        return None


def processor_model() -> str:
    """QEMU's processor model for `-accel kvm`: the host's, without what this KVM cannot virtualise.

    Raises KvmError where there is none.
    """
    from rootvisor.kvm.selftest import run_guest
    from rootvisor.kvm.system import Kvm

    kvm = Kvm()
    try:
        _problem, xsave = run_guest(kvm)
    finally:
        kvm.close()
    return "host" if xsave else "host,xsave=off"


def _say(kind: str, document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps({kind: document}) + "\n")
    sys.stdout.flush()


def main() -> int:
    """Run the job; status 0 when it could be run, whatever its guests did."""
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    with open(job["page"], "rb") as page:
        content = page.read()
    if job["mshv"] and not os.path.exists("/dev/mshv"):
        _say("root", {"problems": ["there is no /dev/mshv"]})
        return 0
    if not job["mshv"]:
        from rootvisor.kvm.errors import KvmError

        try:
            model = processor_model()
        except KvmError:
            model = "host"  # QEMU says for each guest what is wrong
        for guest in job["guests"]:
            guest["argv"] = [model if word == KVM_MODEL else word for word in guest["argv"]]
    log = KernelLog()
    bring_up_loopback()
    server = serve(content, job["port"])
    try:
        boot_all(job["guests"], job["parallel"], lambda result: _say("boot", result), job["policy"])
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
    problems = log.complaints()
    left = partitions() if job["mshv"] else None
    if left:
        problems.append(f"{len(left)} child partitions are left")
    _say("root", {"problems": problems})
    return 0


if __name__ == "__main__":
    sys.path.insert(0, __file__.rsplit("/", 3)[0])
    sys.exit(main())
