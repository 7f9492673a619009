# SPDX-License-Identifier: Apache-2.0
"""A guest of ``rootvisor vmm`` as the tests in the root partition have it: its process, what it says, its API.

Runs where Python is slow: nothing is imported that is not needed, and the VMM is a fork of this process, which has
imported all of it already, instead of a new Python.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self

MARK = b"guest: "
FOLDER = "/tmp/vmm-tests"
#: Seconds for whatever a guest shall do; ROOTVISOR_TEST_PATIENCE multiplies them.
PATIENCE_S = 120.0 * float(os.environ.get("ROOTVISOR_TEST_PATIENCE", "1"))


class GuestError(AssertionError):
    """A guest or its VMM did not do what it should; with what it has printed."""


class Guest:
    """``rootvisor vmm`` with these options, running. As a context it is killed at the end.

    ``job``: where kernels and initial ramdisks are (tests/vmm/job.py). ``work``: the guest's shell script.
    ``hyperv``: it is offered the synthetic interrupt controller and timers, too.
    """

    _number = 0

    def __init__(
        self,
        job: dict[str, Any],
        work: str,
        *options: str,
        kernel: str = "mshv",
        append: str = "",
        console: str = "hvc0",
        api: bool = False,
        boot: bool = True,
        cpus: int = 1,
        hyperv: bool = False,
        memory: str = "128M",
    ) -> None:
        Guest._number += 1
        os.makedirs(FOLDER, exist_ok=True)
        self.name = f"{FOLDER}/{Guest._number}"
        self.socket = f"{self.name}.sock"
        self.initramfs = f"{self.name}.initramfs"
        write_initramfs(self.initramfs, job["kernels"][kernel]["initramfs"], work)
        self.said: list[tuple[str, str]] = []
        self.text = b""
        self.errors = b""
        self.unfinished_line = b""
        self._read = 0
        words = list(options)
        self.payload = {
            "kernel": job["kernels"][kernel]["image"],
            "initramfs": self.initramfs,
            "cmdline": f"console={console} loglevel=4 panic=-1 {append}".strip(),
        }
        if boot:
            words += ["--kernel", self.payload["kernel"], "--initramfs", self.payload["initramfs"]]
            words += [
                "--cmdline",
                self.payload["cmdline"],
                "--cpus",
                f"boot={cpus}" + (",kvm_hyperv=on" if hyperv else ""),
                "--memory",
                f"size={memory}",
            ]
        if console == "ttyS0":
            words += ["--serial", "tty"]
        if api:
            words += ["--api-socket", f"path={self.socket}"]
        self.events = f"{self.name}.events"
        words += ["--event-monitor", f"path={self.events}"]
        self.started = time.monotonic()
        self.times: dict[str, float] = {}
        self._spawn(["vmm", *words])

    def _spawn(self, words: list[str]) -> None:
        input_read, self.input = os.pipe2(os.O_CLOEXEC)
        self._output, output_write = os.pipe2(os.O_CLOEXEC)
        self._error, error_write = os.pipe2(os.O_CLOEXEC)
        self.pid = os.fork()
        if not self.pid:
            try:
                os.setsid()
                for number, fd in enumerate((input_read, output_write, error_write)):
                    os.dup2(fd, number)
                os.closerange(3, 256)
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(0)
                self._program(words)
            except SystemExit as error:
                os._exit(error.code if isinstance(error.code, int) else 70)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(71)
        for fd in (input_read, output_write, error_write):
            os.close(fd)
        self.status: int | None = None
        self._open = {self._output, self._error}

    def _program(self, words: list[str]) -> None:
        """What the new process does."""
        from rootvisor.cli import main

        main(words)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for fd in (self.input, self._output, self._error):
            if fd >= 0:
                os.close(fd)
        for name in (self.socket, self.initramfs, self.events):
            if os.path.exists(name):
                os.unlink(name)

    # --- what it says -----------------------------------------------------------------------------------------------
    def pump(self, seconds: float) -> bool:
        """Takes what there is, or waits so long; False when both streams have ended."""
        if not self._open:
            return False
        for fd in select.select(list(self._open), [], [], max(0.0, seconds))[0]:
            data = os.read(fd, 65536)
            if not data:
                self._open.discard(fd)
            elif fd == self._error:
                self.errors += data
            else:
                self.text += data
                *lines, self.unfinished_line = (self.unfinished_line + data).split(b"\n")
                for line in lines:
                    _, mark, rest = line.partition(MARK)
                    if mark:
                        key, _, value = rest.decode("utf-8", "replace").strip().partition(" ")
                        self.said.append((key, value.strip()))
                        self.times.setdefault(key, time.monotonic() - self.started)
        return bool(self._open)

    def hears(self, wanted: str, seconds: float = PATIENCE_S) -> str:
        """The value of the next line with this key; what is before it is passed over, except problems."""
        deadline = time.monotonic() + seconds
        while True:
            while self._read < len(self.said):
                key, value = self.said[self._read]
                self._read += 1
                if key == wanted:
                    return value
                if key == "problem":
                    raise self.error(f"the guest has a problem: {value}")
            left = deadline - time.monotonic()
            if left < 0:
                raise self.error(f"did not say `{wanted}` within {seconds:.0f} s")
            if not self.pump(min(left, 5.0)) and self._read >= len(self.said):
                raise self.error(f"ended and had not said `{wanted}`")

    def values(self, key: str) -> list[str]:
        """All values of a key until now."""
        self.pump(0)
        return [value for name, value in self.said if name == key]

    def prints(self, wanted: bytes, seconds: float = PATIENCE_S) -> None:
        """Waits for text on the console."""
        deadline = time.monotonic() + seconds
        while wanted not in self.text:
            if time.monotonic() > deadline or not self.pump(1.0):
                raise self.error(f"did not print {wanted!r}")

    def types(self, text: bytes) -> None:
        """Gives the console input."""
        os.write(self.input, text)

    def error(self, reason: str) -> GuestError:
        """An error that shows where the guest was."""
        tail = self.text[-1500:].decode("utf-8", "replace")
        errors = self.errors[-1500:].decode("utf-8", "replace")
        events = ""
        if os.path.exists(self.events):
            with open(self.events, encoding="utf-8", errors="replace") as file:
                events = file.read()[-1500:]
        return GuestError(f"{reason}\n--- console\n{tail}\n--- VMM\n{errors}\n--- events\n{events}")

    # --- the process ------------------------------------------------------------------------------------------------
    def ends(self, status: int = 0, seconds: float = PATIENCE_S) -> None:
        """Waits for the VMM's end; its exit status is as expected, and it has said nothing unless it failed."""
        deadline = time.monotonic() + seconds
        while self.pump(1.0):
            if time.monotonic() > deadline:
                raise self.error(f"the VMM did not end within {seconds:.0f} s")
        self._reap(0)
        if self.status != status:
            raise self.error(f"the VMM ended with status {self.status}, not {status}")
        if not status and self.errors:
            raise self.error("the VMM has something to say")
        for value in self.values("problem"):
            raise self.error(f"the guest has a problem: {value}")

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Ends the VMM with a signal, and waits for it."""
        if self.status is None:
            os.kill(self.pid, number)
            self._reap(0)

    def _reap(self, flags: int) -> None:
        if self.status is None:
            pid, status = os.waitpid(self.pid, flags)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)

    # --- its API ----------------------------------------------------------------------------------------------------
    def calls(self, method: str, name: str, body: object = None, expect: int = 2) -> Any:
        """A call of the API; the status begins with digit ``expect``."""
        deadline = time.monotonic() + PATIENCE_S
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with connection:
            connection.settimeout(PATIENCE_S)
            while True:
                try:
                    connection.connect(self.socket)
                    break
                except OSError:
                    if time.monotonic() > deadline or not self.pump(0.1):
                        raise self.error("there is no API") from None
            data = b"" if body is None else json.dumps(body).encode()
            head = f"{method} /api/v1/{name} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
            connection.sendall(head.encode() + data)
            answer = b""
            while b"\r\n\r\n" not in answer:
                answer += connection.recv(65536) or b"\r\n\r\n"
            top, _, rest = answer.partition(b"\r\n\r\n")
            length = 0
            for line in top.lower().split(b"\r\n"):
                if line.startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            while len(rest) < length:
                more = connection.recv(65536)
                if not more:
                    break
                rest += more
        status = int(top.split(b" ")[1]) if b" " in top else 0
        if status // 100 != expect:
            raise self.error(f"{name}: status {status}: {rest.decode('utf-8', 'replace')}")
        return json.loads(rest) if rest else None

    def memory_blocks(self) -> int:
        """Bytes of the guest's memory file that the root has really given it."""
        folder = f"/proc/{self.pid}/fd"
        for name in os.listdir(folder):
            if os.readlink(f"{folder}/{name}").startswith("/memfd:mshv-ram"):
                return os.stat(f"{folder}/{name}").st_blocks * 512
        raise self.error("the VMM has no memory file")


def await_gone(guest: Guest, name: str) -> None:
    """Waits until the guest has let a device go."""
    deadline = time.monotonic() + PATIENCE_S
    while name in guest.calls("GET", "vm.info")["device_tree"]:
        if time.monotonic() > deadline:
            raise guest.error(f"{name} stays in the tree of devices")
        guest.pump(0.2)


def write_initramfs(path: str, base: str, work: str) -> None:
    """The kernel's initial ramdisk with the guest's script behind it."""
    from rootvisor.boot.cpio import CpioWriter

    archive = CpioWriter()
    archive.file("/work", work.encode())
    with open(base, "rb") as source, open(path, "wb") as file:
        file.write(source.read())
        file.write(archive.finish())
