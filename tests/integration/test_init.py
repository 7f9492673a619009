# SPDX-License-Identifier: Apache-2.0
"""The agent of the initial ramdisk in a plain QEMU machine: streams, statuses, terminal, the end."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from rootvisor.boot.busybox import find_busybox
from rootvisor.boot.initramfs import (
    CONTROL_PORT,
    ROOTFS_VIRTIOFS,
    STREAM_PORTS,
    STREAMS_TTY,
    InitRequest,
    build_base,
    request_archive,
)
from rootvisor.kernels import cache_dir
from rootvisor.kernels.catalogue import find

QEMU = "qemu-system-x86_64"
VIRTIOFSD = next(filter(os.path.exists, ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd")), None)
DEADLINE_S = 60
TERMINAL = "terminal"
ENVIRONMENT = (("PATH", "/usr/bin:/bin"), ("TERM", "xterm"))

Answer = Callable[[bytes, socket.socket], None]


class Guest:
    """A QEMU machine that runs one request; `lines` and `output` fill while it runs."""

    def __init__(self, work: Path, request: InitRequest, answers: dict[str, Answer] | None = None) -> None:
        self.output: dict[str, bytearray] = {}
        self._answers = answers or {}
        self._threads: list[threading.Thread] = []
        self._stack = ExitStack()
        try:
            self._start(work, request)
        except BaseException:
            self.close()
            raise

    def _start(self, work: Path, request: InitRequest) -> None:
        kernel = find("mshv") or find("stock")
        assert kernel is not None
        modules = str(kernel.modules) if kernel.modules else None
        folder = str(cache_dir() / "initramfs")
        base = build_base(find_busybox(folder), modules, ["overlay"] if modules else [], folder)
        ramdisk = work / "ramdisk"
        ramdisk.write_bytes(Path(base).read_bytes() + request_archive(request))
        arguments = [
            *(QEMU, "-M", "q35,memory-backend=memory", "-accel", "tcg,thread=single", "-cpu", "max,la57=off"),
            *("-m", "512", "-object", "memory-backend-memfd,id=memory,size=512M,share=on"),
            *("-kernel", str(kernel.image), "-initrd", str(ramdisk), "-nodefaults", "-no-reboot"),
            *("-append", "console=ttyS0 quiet panic=-1", "-serial", f"file:{work}/console"),
            *("-display", "none", "-device", "virtio-serial-pci"),
        ]
        listeners = {}
        for number, name in enumerate((*STREAM_PORTS, CONTROL_PORT, TERMINAL)):
            path = str(work / name)
            listeners[name] = self._stack.enter_context(socket.socket(socket.AF_UNIX))
            listeners[name].bind(path)
            listeners[name].listen(1)
            device = "virtconsole" if name == TERMINAL else f"virtserialport,name={name}"
            arguments += [
                "-chardev",
                f"socket,id=c{number},path={path}",
                "-device",
                f"{device},chardev=c{number}",
            ]
        if request.rootfs == ROOTFS_VIRTIOFS:
            path = str(work / "files")
            assert VIRTIOFSD is not None
            self._spawn([VIRTIOFSD, f"--socket-path={path}", "-o", "source=/", "-o", "sandbox=chroot"])
            deadline = time.monotonic() + DEADLINE_S
            while not os.path.exists(path):
                assert time.monotonic() < deadline, "virtiofsd does not start"
                time.sleep(0.01)
            arguments += ["-chardev", f"socket,id=files,path={path}"]
            arguments += ["-device", f"vhost-user-fs-pci,chardev=files,tag={request.tag}"]
        self._qemu = self._spawn(arguments)
        self._sockets = {}
        for name, listener in listeners.items():
            listener.settimeout(DEADLINE_S)
            self._sockets[name] = self._stack.enter_context(listener.accept()[0])
            if name != STREAM_PORTS[0]:
                self.output[name] = bytearray()
                self._thread(self._read, name)

    def _spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=None, start_new_session=True
        )
        self._stack.callback(self._kill, process)
        return process

    @staticmethod
    def _kill(process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _thread(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _read(self, name: str) -> None:
        answer = self._answers.get(name)
        while data := self._sockets[name].recv(1 << 16):
            self.output[name] += data
            if answer is not None:
                answer(bytes(self.output[name]), self._sockets[name])

    def _write(self, data: bytes) -> None:
        try:
            self._sockets[STREAM_PORTS[0]].sendall(data)
            self._sockets[STREAM_PORTS[0]].shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the command does not read all of it

    def finish(self, stdin: bytes = b"") -> str:
        """Feed `stdin` and wait for the end; the lines of the control port."""
        self._thread(self._write, stdin)
        self._qemu.wait(DEADLINE_S)
        for thread in self._threads:
            thread.join(DEADLINE_S)
        return bytes(self.output[CONTROL_PORT]).decode()

    def tell(self, line: bytes) -> None:
        """Send a line to the agent."""
        self._sockets[CONTROL_PORT].sendall(line)

    @property
    def stdout(self) -> bytes:
        return bytes(self.output[STREAM_PORTS[1]])

    @property
    def stderr(self) -> bytes:
        return bytes(self.output[STREAM_PORTS[2]])

    def close(self) -> None:
        self._stack.close()


Boot = Callable[..., Guest]


@pytest.fixture
def boot(tmp_path: Path) -> Iterator[Boot]:
    if shutil.which(QEMU) is None:
        pytest.skip(f"{QEMU} is missing: apt-get install qemu-system-x86")
    if find("mshv") is None and find("stock") is None:
        pytest.skip("no kernel in the cache: rootvisor kernel build stock")
    with ExitStack() as guests:

        def start(
            *argv: str,
            streams: str = InitRequest.streams,
            rootfs: str = InitRequest.rootfs,
            answers: dict[str, Answer] | None = None,
        ) -> Guest:
            request = InitRequest(rootfs=rootfs, argv=argv, streams=streams, environment=ENVIRONMENT)
            guest = Guest(tmp_path, request, answers)
            guests.callback(guest.close)
            return guest

        yield start


@pytest.mark.boot
def test_20_mb_pass_through_a_program_of_the_shared_root_unharmed(boot: Boot) -> None:
    if VIRTIOFSD is None:
        pytest.skip("virtiofsd is missing: apt-get install virtiofsd, or qemu-system-common on Debian 12")
    data = os.urandom(20 << 20)
    name = f"/rootvisor-test-{os.getpid()}"
    guest = boot("bash", "-c", f"cat >{name}; cat {name}; echo done >&2; exit 7", rootfs=ROOTFS_VIRTIOFS)
    assert guest.finish(data) == "ready\nexit 7\n"
    assert guest.stdout == data
    assert guest.stderr == b"done\n"
    assert not os.path.exists(name)


@pytest.mark.boot
def test_missing_command_is_127_with_a_message(boot: Boot) -> None:
    guest = boot("no-such-command")
    assert guest.finish() == "ready\nexit 127\n"
    assert guest.stderr == b"rootvisor: no-such-command: command not found\n"


@pytest.mark.boot
def test_signal_then_poweroff_keep_output_and_end_what_was_left_behind(boot: Boot) -> None:
    def interrupt(seen: bytes, _: socket.socket) -> None:
        if seen == b"started\n":
            guest.tell(b"signal INT\n")

    script = (
        'trap "head -c 300000 /dev/zero; poweroff; sleep 1000; echo never" INT; '
        "sleep 1000 & echo started; while :; do sleep 0.1; done"
    )
    guest = boot("sh", "-c", script, answers={STREAM_PORTS[1]: interrupt})
    assert guest.finish() == "ready\n"
    assert guest.stdout == b"started\n" + bytes(300000)


@pytest.mark.boot
def test_terminal_is_the_controlling_one(boot: Boot) -> None:
    sent: list[bytes] = []

    def type_interrupt(seen: bytes, terminal: socket.socket) -> None:
        if b"started" in seen and not sent:
            sent.append(b"\x03")
            terminal.sendall(b"\x03")

    script = 'trap "exit 4" INT; tty; echo started >/dev/tty; while :; do sleep 0.1; done'
    guest = boot("sh", "-c", script, streams=STREAMS_TTY, answers={TERMINAL: type_interrupt})
    assert guest.finish() == "ready\nexit 4\n"
    assert guest.output[TERMINAL].startswith(b"/dev/hvc0\r\n")
