# SPDX-License-Identifier: Apache-2.0
"""The VMM as a process: takes what the command line asks for, serves the API, waits for the end.

The main thread waits for what the guest and signals want; processors, devices and the API have threads of their own.
"""

from __future__ import annotations

import os
import sys
from _signal import (  # type: ignore[import-not-found, unused-ignore]
    SIGHUP,
    SIGINT,
    SIGPWR,
    SIGTERM,
    SIGUSR1,
    SIGWINCH,
    set_wakeup_fd,
    signal,
)

from .controller import ControlError, Controller
from .terminal import Terminal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .api import ApiServer
    from .controller import Machine
    from .events import EventMonitor
    from .options import CommandLine

#: A thread that computes holds the others back for this long (the default is 5 ms).
_SWITCH_INTERVAL_S = 1e-4
FAILED = 1
"""Exit status when the VMM or its guest failed; the line on stderr says why."""


def run(command_line: CommandLine) -> int:
    """Run until the guest or the user ends it; the exit status: 0, 1, or 128 and the number of a signal."""
    try:
        return _Process(command_line).run()
    except Exception as error:
        if command_line.debug:
            _show_traceback(error)
        else:
            kind = type(error).__name__
            _say(f"internal error: {kind}: {error}; run with --debug for the traceback")
        return FAILED


def machine_class() -> type[Machine]:
    """What machines are made with; imported late, when options have been found right."""
    from .machine import Machine as PartitionMachine

    return PartitionMachine


class _Process:
    """What a command line asks for, while it runs."""

    def __init__(self, command_line: CommandLine) -> None:
        self._command_line = command_line
        self._monitor: EventMonitor | None = None
        self._server: ApiServer | None = None
        self._interrupted = False

    def run(self) -> int:
        """Open everything, run, close everything."""
        try:
            self._open_monitor()
            sys.setswitchinterval(_SWITCH_INTERVAL_S)
            made = machine_class()
            controller = Controller(made, self._monitor, stays=self._command_line.no_shutdown)
            terminal = made.terminal = Terminal(controller.press, lambda: controller.end(128 + SIGINT))
            self._take_signals(controller, terminal)
            try:
                if self._has_terminal():
                    terminal.start()
                self._open_server(controller)
                self._report_start()
                self._begin(controller)
                status = controller.run()
                if controller.failure:
                    _say(controller.failure)
                return status
            finally:
                if self._server is not None:
                    self._server.stop()
                set_wakeup_fd(-1)
                controller.close()
                terminal.stop()
        except _Refusal as refusal:
            if self._command_line.debug and refusal.__cause__ is not None:
                _show_traceback(refusal.__cause__)
            _say(str(refusal))
            return FAILED
        finally:
            if self._monitor is not None:
                self._monitor.close()

    def _open_monitor(self) -> None:
        target = self._command_line.event_monitor
        if target is None:
            return
        from .events import EventMonitor

        try:
            self._monitor = EventMonitor.open(target)
        except OSError as error:
            where = target.get("path", f"file descriptor {target.get('fd')}")
            raise _Refusal(f"cannot write events to {where}: {os.strerror(error.errno or 0)}") from error

    def _open_server(self, controller: Controller) -> None:
        target = self._command_line.api_socket
        if target is None:
            return
        from .api import ApiError, ApiServer, Listener
        from .api_routes import answer

        try:
            listener = Listener(target)
        except ApiError as error:
            raise _Refusal(str(error)) from error
        self._server = ApiServer(listener, lambda method, path, body: answer(controller, method, path, body))
        self._server.start()

    def _report_start(self) -> None:
        if self._monitor is not None:
            self._monitor.report("vmm", "starting")

    def _begin(self, controller: Controller) -> None:
        """Create and boot, or restore, what the command line names; nothing when it names only a socket."""
        vm, restore = self._command_line.vm, self._command_line.restore
        try:
            if restore is not None:
                # Without the API nobody could say that the guest is to go on.
                controller.restore(restore | {"resume": restore["resume"] or self._server is None})
            elif vm is not None:
                controller.create(vm)
                controller.boot()
        except ControlError as error:
            raise _Refusal(str(error)) from error

    def _has_terminal(self) -> bool:
        """Whether a console of the guest's is this process's terminal."""
        vm = self._command_line.vm
        return vm is not None and any(vm[name].get("mode") == "Tty" for name in ("console", "serial"))

    def _take_signals(self, controller: Controller, terminal: Terminal) -> None:
        """SIGPWR is the power button; SIGINT, SIGTERM and SIGHUP end the guest, the second one at once."""

        def end(number: int, _frame: object) -> None:
            if self._interrupted:
                os._exit(128 + number)
            self._interrupted = True
            controller.end(128 + number)

        set_wakeup_fd(controller.wake_fd, warn_on_full_buffer=False)
        for number in (SIGINT, SIGTERM, SIGHUP):
            signal(number, end)
        signal(SIGWINCH, lambda _number, _frame: terminal.resized())
        signal(
            SIGUSR1, lambda _number, _frame: None
        )  # takes processors out of the kernel (mshv.Vp.interrupt)
        signal(SIGPWR, lambda _number, _frame: controller.press())


class _Refusal(Exception):
    """The command line cannot be carried out; one line."""


def _show_traceback(error: BaseException) -> None:
    import traceback  # 100 ms in a root partition

    traceback.print_exception(error)


def _say(text: str) -> None:
    try:
        sys.stderr.write(f"rootvisor: {' '.join(text.split())}\n")
        sys.stderr.flush()
    except OSError:
        pass
