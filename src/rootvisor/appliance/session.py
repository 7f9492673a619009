# SPDX-License-Identifier: Apache-2.0
"""One life of the appliance: start its processes, carry its streams, notice its end, leave nothing behind."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from typing import Literal

from rootvisor.boot.initramfs import CONTROL_PORT, STREAM_PORTS

from . import children, command_lines, guest
from .console import Console
from .errors import ApplianceError
from .interrupts import ENDING, Interrupts
from .qmp import PortOpened, Qmp
from .request import ApplianceKernel, Request
from .sockets import memory_file, served_connection
from .streams import Input, Output
from .terminal import RawTerminal, window_size
from .tools import Tools, processors

EXIT_TIMEOUT = 124
#: Seconds from the inner program's end to the machine's power-off, which flushes writable folders.
_POWER_OFF_SECONDS = 20.0
#: Seconds that the inner program has to end after SIGTERM or SIGHUP, before everything is ended.
_GRACE_SECONDS = 10.0
_DRAIN_POLL_SECONDS = 0.005

_Event = Literal["console", "qmp", "control", "signal", "qemu", "virtiofsd"]


@dataclass(frozen=True)
class Ended:
    """The inner program ended, or was ended, with this exit status."""

    status: int


@dataclass(frozen=True)
class Died:
    """The appliance ended without its program's status. ``ready``: the program had been started by then.
    ``hopeless``: another try would end the same way."""

    reason: str
    ready: bool
    hopeless: bool
    console: list[str]


class Session:
    """Use as a context manager around :meth:`run`; leaving it ends every process and closes every socket."""

    def __init__(
        self, request: Request, tools: Tools, kernel: ApplianceKernel, deadline: float | None
    ) -> None:
        self._request = request
        self._tools = tools
        self._kernel = kernel
        self._deadline = deadline
        self._stack = contextlib.ExitStack()
        self._selector = selectors.DefaultSelector()
        self._console = Console()
        self._qemu_text = Console()
        self._control_partial = b""
        self._ready = False
        self._status: int | None = None
        self._stopped: str | None = None  # reason of QEMU's SHUTDOWN event
        self._error: str | None = None  # why the init gave up, which it says before "exit 125"
        self._signals: list[int] = []
        self._kill_at: float | None = None  # when a forwarded signal must have worked
        self._outputs: list[Output] = []
        self._inputs: list[Input] = []
        self.ready_seconds: float | None = None

    def __enter__(self) -> Session:
        self._stack.callback(self._selector.close)
        self._interrupts = self._stack.enter_context(Interrupts())
        self._selector.register(self._interrupts.socket, selectors.EVENT_READ, "signal")
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    # start

    def _pair(self) -> tuple[socket.socket, socket.socket]:
        ours, theirs = socket.socketpair()
        self._stack.callback(ours.close)
        return ours, theirs

    def _start(self) -> None:
        request = self._request
        folders = {command_lines.ROOT_TAG: "/"}
        for number, folder in enumerate(dict.fromkeys(request.writable)):
            folders[f"writable{number}"] = folder
        given: list[socket.socket] = []  # QEMU's ends, which we close once it has them
        try:
            shares: dict[str, int] = {}
            for tag, folder in folders.items():
                shares[tag] = self._serve(folder, given, writable=tag != command_lines.ROOT_TAG)
            console, theirs = self._pair()
            given.append(theirs)
            self._watch(console, "console")
            qmp, theirs = self._pair()
            given.append(theirs)
            self._qmp_socket = qmp
            self._watch(qmp, "qmp")
            ports: dict[str, int] = {}
            self._streams: list[socket.socket] = []
            names = () if request.tty else STREAM_PORTS
            for name in names:
                ours, theirs = self._pair()
                given.append(theirs)
                self._streams.append(ours)
                ports[name] = theirs.fileno()
            self._control, theirs = self._pair()
            given.append(theirs)
            ports[CONTROL_PORT] = theirs.fileno()
            self._watch(self._control, "control")
            terminal_fd = None
            if request.tty:
                ours, theirs = self._pair()
                given.append(theirs)
                self._streams = [ours, ours]
                terminal_fd = theirs.fileno()
            size = window_size(request.streams[1])
            ramdisk = memory_file(
                "rootvisor-ramdisk", *guest.ramdisk(request, self._kernel.modules, folders, size)
            )
            self._stack.callback(os.close, ramdisk)
            command = command_lines.qemu_command(
                self._tools.qemu,
                kernel=self._kernel.image,
                initrd=f"/proc/self/fd/{ramdisk}",
                append=command_lines.kernel_command_line(request.kernel_args),
                memory_mib=request.memory_mib,
                cpus=request.cpus or processors(self._tools.qemu),
                shares=shares,
                ports=ports,
                console_fd=given[len(folders)].fileno(),
                qmp_fd=given[len(folders) + 1].fileno(),
                terminal_fd=terminal_fd,
                extra=request.qemu_args,
            )
            self._qemu = self._spawn(command, "qemu", [ramdisk, *(one.fileno() for one in given)])
            self._qmp = Qmp(qmp)
        finally:
            for one in given:
                one.close()

    def _serve(self, folder: str, given: list[socket.socket], *, writable: bool) -> int:
        server = self._tools.virtiofsd
        listener, client = served_connection()
        given.append(client)
        root = os.geteuid() == 0

        def prepare() -> None:
            children.raise_open_files_limit()
            if server.namespace:
                children.enter_user_namespace()
            if not writable:
                if not root and not server.namespace:
                    with contextlib.suppress(OSError):
                        children.enter_user_namespace()
                with contextlib.suppress(OSError):  # the guest mounts it read-only as well
                    children.make_host_read_only()

        command = command_lines.virtiofsd_command(
            server, folder, listener.fileno(), writable=writable, root=root
        )
        try:
            self._spawn(command, "virtiofsd", [listener.fileno()], prepare)
        finally:
            listener.close()
        return client.fileno()

    def _spawn(
        self, command: list[str], event: _Event, fds: list[int], prepare: children.Preparation | None = None
    ) -> subprocess.Popen[bytes]:
        ours, theirs = os.pipe()
        try:
            process = children.spawn(command, pass_fds=fds, output=theirs, prepare=prepare)
        except (OSError, subprocess.SubprocessError) as error:
            os.close(ours)
            raise ApplianceError(f"cannot start {command[0]}: {error}; install its package anew") from error
        finally:
            os.close(theirs)
        self._stack.callback(os.close, ours)
        self._stack.callback(children.kill, process)
        # the pipe ends with the process, after its last words
        self._selector.register(ours, selectors.EVENT_READ, event)
        return process

    def _watch(self, sock: socket.socket, event: _Event) -> None:
        self._selector.register(sock, selectors.EVENT_READ, event)

    # life

    def run(self) -> Ended | Died:
        """Start the appliance and stay until it has ended. Raises :class:`ApplianceError`: cannot start."""
        started = time.monotonic()
        self._start()
        sign_of_life = started
        finish: float | None = None
        while True:
            now = time.monotonic()
            if self._ready and self.ready_seconds is None:
                self.ready_seconds = now - started
            limits = [limit for limit in (self._deadline, self._kill_at, finish) if limit is not None]
            if not self._ready:
                limits.append(sign_of_life + self._request.ready_timeout)
            wait = max(min(limits) - now, 0) if limits else None
            for key, _ in self._selector.select(wait):
                if key.data in ("console", "control"):
                    sign_of_life = time.monotonic()
                outcome = self._handle(key.data, key.fileobj)
                if outcome is not None:
                    return outcome
            now = time.monotonic()
            if self._deadline is not None and now >= self._deadline:
                return Ended(EXIT_TIMEOUT)
            if self._kill_at is not None and now >= self._kill_at:
                return Ended(128 + self._signals[-1])
            if not self._ready and now >= sign_of_life + self._request.ready_timeout:
                return self._died(f"no sign of life for {self._request.ready_timeout:g} s")
            if self._status is not None:
                if self._stopped is not None or (finish is not None and now >= finish):
                    return self._drained()
                finish = finish or now + _POWER_OFF_SECONDS

    def _handle(self, event: _Event, source: object) -> Ended | Died | None:
        if event == "signal":
            return self._on_signals()
        data = self._read(source)
        if event == "console":
            if data:
                self._console.feed(data)
                if self._request.console_fd is not None:
                    with contextlib.suppress(OSError):
                        os.write(self._request.console_fd, data)
                if self._console.death and self._status is None:
                    return self._died(self._console.death)
        elif event == "control":
            self._on_control(data)
            if self._error is not None and self._status is not None:
                return self._died(self._error, hopeless=True)
        elif event == "qmp":
            for happened in self._qmp.received(data):
                if isinstance(happened, PortOpened):
                    if happened.port == STREAM_PORTS[1]:
                        self._begin()
                    continue
                self._stopped = happened.reason
                if self._status is None:
                    return self._died(f"the machine stopped ({happened.reason})")
        elif event == "qemu":
            self._qemu_text.feed(data)
            if not data:
                return self._on_qemu_end()
        elif event == "virtiofsd":
            self._qemu_text.feed(data)
            if not data and self._status is None and self._stopped is None:
                with contextlib.suppress(subprocess.TimeoutExpired):  # it ends when QEMU does, which says why
                    self._qemu.wait(1.0)
                    self._qemu_text.feed(self._last_words())
                    return self._on_qemu_end()
                return self._died("virtiofsd ended; is this folder readable, and is memory left?")
        return None

    def _read(self, source: object) -> bytes:
        """Read what there is; at the end of a source it is watched no longer."""
        try:
            if isinstance(source, socket.socket):
                data = source.recv(1 << 16)
            else:
                assert isinstance(source, int)
                data = os.read(source, 1 << 16)
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(source)  # type: ignore[arg-type]
        return data

    def _on_signals(self) -> Ended | None:
        for number in self._interrupts.received():
            if number == signal.SIGWINCH:
                self._send_window_size()
            elif number in ENDING:
                if not self._ready or self._signals:
                    return Ended(128 + number)
                self._signals.append(number)
                if number != signal.SIGINT:  # which a program at a prompt may well ignore
                    self._kill_at = time.monotonic() + _GRACE_SECONDS
                self._tell(f"signal {number.name.removeprefix('SIG')}")
        return None

    def _on_control(self, data: bytes) -> None:
        *lines, self._control_partial = (self._control_partial + data).split(b"\n")
        for line in lines:
            word, _, rest = line.decode("ascii", "replace").partition(" ")
            if word == "ready" and self._request.tty:
                self._begin()  # QEMU does not tell of a console's opening
            elif word == "error":
                self._error = rest
            elif word == "exit" and rest.strip().isdigit():
                self._status = int(rest) & 0xFF

    def _last_words(self) -> bytes:
        """What the ended QEMU has written to its pipe and nobody has read yet."""
        for key in self._selector.get_map().values():
            if key.data == "qemu" and isinstance(key.fileobj, int):
                return os.read(key.fileobj, 1 << 16)
        return b""

    def _on_qemu_end(self) -> Ended | Died:
        status = self._qemu.wait()
        if self._status is not None:
            return Ended(self._status)
        words = self._qemu_text.tail(1)
        if status < 0:
            return self._died(f"QEMU was killed by {signal.Signals(-status).name}")
        return self._died(words[0] if words else f"QEMU ended with status {status}", hopeless=not self._ready)

    def _died(self, reason: str, *, hopeless: bool = False) -> Died:
        return Died(reason, self._ready, hopeless, self._console.tail())

    # streams

    def _begin(self) -> None:
        """The inner program is being started: the init has opened the port for its output. From here on nothing
        can be tried again."""
        if not self._ready:
            self._ready = True
            self._join_streams()

    def _join_streams(self) -> None:
        """From here on the caller's streams belong to the inner program (and not before: a second try must find
        the input whole)."""
        fds = self._request.streams
        if self._request.tty:
            self._stack.enter_context(RawTerminal(fds[0]))
            self._send_window_size()
            joined = [(self._streams[1], fds[1])]
        else:
            joined = [(self._streams[1], fds[1]), (self._streams[2], fds[2])]
        source = Input(fds[0], self._streams[0])
        gone = [self._reader_gone, lambda: None]  # what is lost of standard error is lost
        self._outputs = [Output(sock, fd, tell) for (sock, fd), tell in zip(joined, gone, strict=False)]
        self._stack.callback(source.close)
        self._stack.callback(self._cut_streams)
        for thread in (source, *self._outputs):
            thread.start()

    def _cut_streams(self) -> None:
        for sock in self._streams:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _reader_gone(self) -> None:
        """Nobody reads our standard output any more: the inner program is to learn it as any program does."""
        self._tell("signal HUP" if self._request.tty else "lost stdout")

    def _send_window_size(self) -> None:
        size = window_size(self._request.streams[1]) if self._request.tty else None
        if self._ready and size:
            self._tell(f"winsize {size[0]} {size[1]}")

    def _tell(self, line: str) -> None:
        with contextlib.suppress(OSError):
            self._control.send(f"{line}\n".encode(), socket.MSG_DONTWAIT)

    def _drained(self) -> Ended | Died:
        """Wait until QEMU has passed on everything that the stopped guest had written.

        It holds back what our sockets had no room for, and writes on as soon as there is room. So when the
        sockets are empty, and still are after QEMU's main loop has come round three times, that was all.
        """
        assert self._status is not None
        quiet_rounds, seen = 0, -1
        while quiet_rounds < 3 and self._qemu.poll() is None:
            received = sum(output.received for output in self._outputs)
            if received != seen or any(output.waiting() for output in self._outputs):
                quiet_rounds, seen = 0, received
            else:
                quiet_rounds += 1
            self._qmp.sync()
            wait: float | None = _DRAIN_POLL_SECONDS
            while not self._qmp.idle and self._qemu.poll() is None:
                for key, _ in self._selector.select(wait):
                    if key.data == "signal":
                        if outcome := self._on_signals():
                            return outcome
                    elif key.data == "qmp":
                        self._qmp.received(self._read(key.fileobj))
                    else:
                        self._read(key.fileobj)
                if self._deadline is not None and time.monotonic() >= self._deadline:
                    return Ended(EXIT_TIMEOUT)
            if any(output.waiting() for output in self._outputs):
                time.sleep(_DRAIN_POLL_SECONDS)  # the reader is slow
        children.kill(self._qemu)
        for output in self._outputs:  # what is left ends with QEMU's end of the socket
            while output.is_alive():
                output.join(0.05)
                if outcome := self._on_signals():
                    return outcome
        return Ended(self._status)
