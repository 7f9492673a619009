# SPDX-License-Identifier: Apache-2.0
"""QEMU and its file servers: started with everything they need, joined to us by sockets and pipes, ended together."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess

from rootvisor.boot.initramfs import CONTROL_PORT, STREAM_PORTS
from rootvisor.files import virtiofsd

from . import children, command_lines, guest
from .errors import ApplianceError
from .hardware import SCREEN_PORT
from .host_tsc import TscMeasurement
from .request import ApplianceKernel, Request
from .sockets import memory_file, served_connection
from .terminal import window_size
from .tools import Tools, processors


class Emulator:
    """A context manager: entering it starts the processes, leaving it ends them and closes every socket.

    ``console``, ``qmp``, ``control`` and ``screen`` are our ends of QEMU's sockets. ``streams`` are those of the
    program's standard input, output and error, or twice the one of its terminal. ``qemu_words`` and ``server_words``
    are pipes with what QEMU resp. each file server prints; a pipe ends with its process. Raises
    :class:`ApplianceError`: cannot start.
    """

    console: socket.socket
    qmp: socket.socket
    control: socket.socket
    screen: socket.socket | None = None
    streams: list[socket.socket]
    qemu: subprocess.Popen[bytes]
    qemu_words: int
    server_words: list[int]

    def __init__(self, request: Request, tools: Tools, kernel: ApplianceKernel) -> None:
        self._request = request
        self._tools = tools
        self._kernel = kernel
        self._stack = contextlib.ExitStack()
        self._given: list[socket.socket] = []  # QEMU's ends, which we close once it has them

    def __enter__(self) -> Emulator:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        finally:
            for one in self._given:
                one.close()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        request = self._request
        measurement = TscMeasurement()
        folders = {command_lines.ROOT_TAG: "/"}
        for number, folder in enumerate(dict.fromkeys(request.writable)):
            folders[f"writable{number}"] = folder
        self.server_words = []
        shares = {
            tag: self._serve(folder, writable=tag != command_lines.ROOT_TAG)
            for tag, folder in folders.items()
        }
        self.console, console_fd = self._pair()
        self.qmp, qmp_fd = self._pair()
        ports: dict[str, int] = {}
        self.streams = []
        terminal_fd = None
        if request.tty:
            terminal, terminal_fd = self._pair()
            self.streams = [terminal, terminal]
        else:
            for name in STREAM_PORTS:
                stream, ports[name] = self._pair()
                self.streams.append(stream)
        self.control, ports[CONTROL_PORT] = self._pair()
        if request.picture is not None:
            self.screen, ports[SCREEN_PORT] = self._pair()
        size = window_size(request.streams[1])
        ramdisk = memory_file(
            "rootvisor-ramdisk", *guest.ramdisk(request, self._kernel.modules, folders, size)
        )
        self._stack.callback(os.close, ramdisk)
        command = command_lines.qemu_command(
            self._tools.qemu,
            kernel=self._kernel.image,
            initrd=f"/proc/self/fd/{ramdisk}",
            append=command_lines.kernel_command_line(request.kernel_args, measurement.khz()),
            memory_mib=request.memory_mib,
            cpus=request.cpus or processors(self._tools.qemu),
            shares=shares,
            ports=ports,
            console_fd=console_fd,
            qmp_fd=qmp_fd,
            terminal_fd=terminal_fd,
            extra=request.qemu_args,
        )
        self.qemu, self.qemu_words = self._spawn(command, [ramdisk, *(one.fileno() for one in self._given)])

    def _pair(self) -> tuple[socket.socket, int]:
        """Our end of a new connection, and the number of QEMU's."""
        ours, theirs = socket.socketpair()
        self._stack.callback(ours.close)
        self._given.append(theirs)
        return ours, theirs.fileno()

    def _serve(self, folder: str, *, writable: bool) -> int:
        """Start a file server; gives the number of QEMU's end."""
        server = self._tools.virtiofsd
        listener, client = served_connection()
        self._given.append(client)
        command = virtiofsd.command(server, folder, listener.fileno(), writable=writable)
        try:
            words = self._spawn(virtiofsd.confined(server, command, writable=writable), [listener.fileno()])[
                1
            ]
        finally:
            listener.close()
        self.server_words.append(words)
        return client.fileno()

    def _spawn(self, command: list[str], fds: list[int]) -> tuple[subprocess.Popen[bytes], int]:
        """The process, and the pipe with what it prints."""
        ours, theirs = os.pipe()
        try:
            process = children.spawn(command, pass_fds=fds, output=theirs)
        except (OSError, subprocess.SubprocessError) as error:
            os.close(ours)
            raise ApplianceError(f"cannot start {command[0]}: {error}; install its package anew") from error
        finally:
            os.close(theirs)
        self._stack.callback(os.close, ours)
        self._stack.callback(children.kill, process)
        return process, ours
