# SPDX-License-Identifier: Apache-2.0
"""One life of the appliance: what happens from its start to its end, and how it ended."""

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

from rootvisor.boot.initramfs import STREAM_PORTS

from . import children
from .console import Console
from .emulator import Emulator
from .interrupts import ENDING, Interrupts
from .joined_streams import JoinedStreams
from .qmp import PortOpened, Qmp
from .request import ApplianceKernel, Request
from .terminal import window_size
from .tools import Tools

EXIT_TIMEOUT = 124
#: Seconds from the inner program's end to the machine's power-off, which flushes writable folders.
_POWER_OFF_SECONDS = 20.0
#: Seconds that the inner program has to end after SIGTERM or SIGHUP, before everything is ended.
_GRACE_SECONDS = 10.0
#: Seconds that a dying kernel has for its last words; it resets the machine when it has said them.
_LAST_WORDS_SECONDS = 1.0
_DRAIN_POLL_SECONDS = 0.005

_Event = Literal["console", "qmp", "control", "screen", "signal", "qemu", "virtiofsd"]


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
        self._emulator = Emulator(request, tools, kernel)
        self._deadline = deadline
        self._stack = contextlib.ExitStack()
        self._selector = selectors.DefaultSelector()
        self._console = Console()
        self._qemu_text = Console()
        self._control_partial = b""
        self._streams: JoinedStreams | None = None  # once the program has been started
        self._status: int | None = None
        self._stopped: str | None = None  # reason of QEMU's SHUTDOWN event
        self._error: str | None = None  # why the init gave up, which it says before "exit 125"
        self._signals: list[int] = []
        self._kill_at: float | None = None  # when a forwarded signal must have worked

    def __enter__(self) -> Session:
        self._stack.callback(self._selector.close)
        self._interrupts = self._stack.enter_context(Interrupts())
        self._watch(self._interrupts.socket, "signal")
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _watch(self, source: socket.socket | int, event: _Event) -> None:
        self._selector.register(source, selectors.EVENT_READ, event)

    def run(self) -> Ended | Died:
        """Start the appliance and stay until it has ended. Raises :class:`ApplianceError`: cannot start."""
        sign_of_life = time.monotonic()
        emulator = self._stack.enter_context(self._emulator)
        self._qmp = Qmp(emulator.qmp)
        self._watch(emulator.console, "console")
        self._watch(emulator.qmp, "qmp")
        self._watch(emulator.control, "control")
        if emulator.screen is not None:
            self._watch(emulator.screen, "screen")
        self._watch(emulator.qemu_words, "qemu")
        for words in emulator.server_words:
            self._watch(words, "virtiofsd")
        finish: float | None = None
        while True:
            now = time.monotonic()
            limits = [limit for limit in (self._deadline, self._kill_at, finish) if limit is not None]
            if self._streams is None:
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
            if self._streams is None and now >= sign_of_life + self._request.ready_timeout:
                return self._died(f"no sign of life for {self._request.ready_timeout:g} s")
            if self._status is not None:
                if self._stopped is not None or (finish is not None and now >= finish):
                    return self._drained()
                finish = finish or now + _POWER_OFF_SECONDS

    # events

    def _handle(self, event: _Event, source: object) -> Ended | Died | None:
        if event == "signal":
            return self._on_signals()
        data = self._read(source)
        if event == "console":
            self._on_console(data)
            if self._console.death and self._status is None:
                self._hear_last_words()
                return self._died(self._console.death)
        elif event == "control":
            self._on_control(data)
            if self._error is not None and self._status is not None:
                return self._died(self._error, hopeless=True)
        elif event == "screen":
            self._on_screen(data)
        elif event == "qmp":
            self._on_qmp(data)
            if self._stopped is not None and self._status is None:
                self._hear_last_words()
                return self._died(self._console.death or f"the machine stopped ({self._stopped})")
        elif event == "qemu":
            self._qemu_text.feed(data)
            if not data:
                return self._on_qemu_end()
        elif event == "virtiofsd":
            self._qemu_text.feed(data)
            if not data and self._status is None and self._stopped is None:
                with contextlib.suppress(subprocess.TimeoutExpired):  # it ends when QEMU does, which says why
                    self._emulator.qemu.wait(1.0)
                    self._qemu_text.feed(self._qemu_last_words())
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

    def _on_console(self, data: bytes) -> None:
        if not data:
            return
        self._console.feed(data)
        if self._request.console_fd is not None:
            with contextlib.suppress(OSError):
                os.write(self._request.console_fd, data)

    def _on_qmp(self, data: bytes) -> None:
        for happened in self._qmp.received(data):
            if not isinstance(happened, PortOpened):
                self._stopped = happened.reason
            elif happened.port == STREAM_PORTS[1]:
                self._begin()

    def _on_signals(self) -> Ended | None:
        for number in self._interrupts.received():
            if number == signal.SIGWINCH:
                self._send_window_size()
            elif number == signal.SIGPWR:  # a power button, for a program that has one
                self._tell("signal PWR")
            elif number in ENDING:
                if self._streams is None or self._signals:
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

    def _on_screen(self, data: bytes) -> None:
        screen, picture = self._emulator.screen, self._request.picture
        if screen is None or picture is None or b"\n" not in data:
            return

        def answer(problem: str) -> None:
            with contextlib.suppress(OSError):
                screen.send((f"error {problem}\n" if problem else "done\n").encode(), socket.MSG_DONTWAIT)

        self._qmp.picture(*picture, answer)

    def _begin(self) -> None:
        """The inner program is being started: the init has opened the port for its output. From here on the caller's
        streams are its own, and nothing can be tried again (before, a second try must find the input whole)."""
        if self._streams is None:
            request = self._request
            self._streams = self._stack.enter_context(
                JoinedStreams(
                    self._emulator.streams, request.streams, tty=request.tty, reader_gone=self._reader_gone
                )
            )
            self._send_window_size()

    # what the appliance is told

    def _reader_gone(self) -> None:
        """Nobody reads our standard output any more: the inner program is to learn it as any program does."""
        self._tell("signal HUP" if self._request.tty else "lost stdout")

    def _send_window_size(self) -> None:
        size = window_size(self._request.streams[1]) if self._request.tty else None
        if self._streams is not None and size:
            self._tell(f"winsize {size[0]} {size[1]}")

    def _tell(self, line: str) -> None:
        with contextlib.suppress(OSError):
            self._emulator.control.send(f"{line}\n".encode(), socket.MSG_DONTWAIT)

    # ends

    def _hear_last_words(self) -> None:
        """Take what the dying kernel still prints: until the machine has stopped and its console is empty."""
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        with selectors.DefaultSelector() as selector:
            for key in self._selector.get_map().values():
                if key.data in ("console", "qmp"):
                    selector.register(key.fileobj, selectors.EVENT_READ, key.data)
            while selector.get_map():
                wait = 0 if self._stopped is not None else max(deadline - time.monotonic(), 0)
                ready = selector.select(wait)
                if not ready:
                    return
                for key, _ in ready:
                    data = self._read(key.fileobj)
                    if not data:
                        selector.unregister(key.fileobj)
                    elif key.data == "console":
                        self._on_console(data)
                    else:
                        self._on_qmp(data)
                if time.monotonic() >= deadline:
                    return

    def _qemu_last_words(self) -> bytes:
        """What the ended QEMU has written to its pipe and nobody has read yet."""
        if any(key.data == "qemu" for key in self._selector.get_map().values()):
            return os.read(self._emulator.qemu_words, 1 << 16)
        return b""

    def _on_qemu_end(self) -> Ended | Died:
        status = self._emulator.qemu.wait()
        if self._status is not None:
            return Ended(self._status)
        words = self._qemu_text.tail(1)
        if status < 0:
            return self._died(f"QEMU was killed by {signal.Signals(-status).name}")
        return self._died(
            words[0] if words else f"QEMU ended with status {status}", hopeless=self._streams is None
        )

    def _died(self, reason: str, *, hopeless: bool = False) -> Died:
        return Died(reason, self._streams is not None, hopeless, self._console.tail())

    def _drained(self) -> Ended | Died:
        """Wait until QEMU has passed on everything that the stopped guest had written.

        It holds back what our sockets had no room for, and writes on as soon as there is room. So when the
        sockets are empty, and still are after QEMU's main loop has come round three times, that was all.
        """
        assert self._status is not None
        qemu, streams = self._emulator.qemu, self._streams
        if streams is None:
            return Ended(self._status)
        quiet_rounds, seen = 0, -1
        while quiet_rounds < 3 and qemu.poll() is None:
            received = streams.received
            if received != seen or streams.waiting:
                quiet_rounds, seen = 0, received
            else:
                quiet_rounds += 1
            self._qmp.sync()
            while not self._qmp.idle and qemu.poll() is None:
                for key, _ in self._selector.select(_DRAIN_POLL_SECONDS):
                    if key.data == "signal":
                        if outcome := self._on_signals():
                            return outcome
                    elif key.data == "qmp":
                        self._qmp.received(self._read(key.fileobj))
                    else:
                        self._read(key.fileobj)
                if self._deadline is not None and time.monotonic() >= self._deadline:
                    return Ended(EXIT_TIMEOUT)
            if streams.waiting:
                time.sleep(_DRAIN_POLL_SECONDS)  # the reader is slow
        children.kill(qemu)
        while not streams.finished(0.05):  # what is left ends with QEMU's end of the socket
            if outcome := self._on_signals():
                return outcome
        return Ended(self._status)
