# SPDX-License-Identifier: Apache-2.0
"""Runs one command in a guest: this process's streams are the command's, and its exit status is ours.

The description (`rootvisor guest` makes it, outside) is a dict: ``vm``, a checked configuration; ``initrds``, paths or
bytes; ``file_server``, the command line of the root file system's server; ``tty``; ``verbose``; ``timeout_s`` or None.
"""

from __future__ import annotations

import os
import sys
from _signal import (  # type: ignore[import-not-found, unused-ignore]
    ITIMER_REAL,
    SIGALRM,
    SIGHUP,
    SIGINT,
    SIGPWR,
    SIGTERM,
    SIGUSR1,
    SIGWINCH,
    set_wakeup_fd,
    setitimer,
    signal,
)

from .agent import Agent
from .agent_machine import CRASH, POWEROFF, RESET, TRIPLE_FAULT, AgentMachine
from .controller import ControlError, Controller
from .terminal import Terminal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

STATUS_TRIPLE_FAULT = 118
STATUS_RESET = 119
STATUS_CRASH = 120
STATUS_TIMEOUT = 124
STATUS_FAILURE = 125
STATUS_INTERRUPTED = 130

#: A thread that computes holds the others back for this long (the default is 5 ms).
_SWITCH_INTERVAL_S = 1e-4
_SIGNALS = {SIGINT: "INT", SIGTERM: "TERM", SIGHUP: "HUP"}
_STATUS = {TRIPLE_FAULT: STATUS_TRIPLE_FAULT, RESET: STATUS_RESET, CRASH: STATUS_CRASH}
_SHOWN_LINES = 40


def run(description: dict[str, Any]) -> int:
    """Runs until the guest ends; errors that the user can mend are one line on stderr and status 125."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    return _Guest(description).run()


class _Guest:
    """One guest, while it runs."""

    def __init__(self, description: dict[str, Any]) -> None:
        self._description = description
        self._tty = bool(description["tty"])
        self._signals = 0
        self._agent = Agent(terminal=self._tty, log_copy=2 if description["verbose"] else None)
        AgentMachine.agent = self._agent
        AgentMachine.initrds = tuple(description["initrds"])
        AgentMachine.file_server = description["file_server"]
        AgentMachine.how = ""
        self._controller = Controller(AgentMachine)
        self._terminal = AgentMachine.terminal = Terminal(
            self._press, lambda: self._controller.end(STATUS_INTERRUPTED)
        )

    def run(self) -> int:
        """Boots, waits, gives everything back, says what the user should know; the exit status."""
        controller = self._controller
        status, refusal = STATUS_FAILURE, ""
        self._take_signals()
        try:
            if self._tty:
                self._terminal.start()
            controller.create(self._description["vm"])
            controller.boot()
            self._agent.listen()
            status = controller.run()
        except ControlError as error:
            refusal = str(error)
        finally:
            setitimer(ITIMER_REAL, 0)
            set_wakeup_fd(-1)
            controller.close()
            self._terminal.stop()
            self._agent.close()
        refusal = refusal or controller.failure
        if refusal:
            self._say(refusal)
            return STATUS_FAILURE
        if status:
            self._explain_end(status)
            return status
        return self._outcome()

    def _outcome(self) -> int:
        """The guest ended as it wished."""
        agent, how = self._agent, AgentMachine.how
        if how == POWEROFF and agent.error:
            self._say(agent.error)
            return STATUS_FAILURE
        if how == POWEROFF:
            return agent.status or 0
        if how == CRASH:
            self._say("the guest's kernel crashed; the last lines of its console:")
            self._show_tail()
        elif how == TRIPLE_FAULT:
            self._say("the guest stopped with a triple fault")
            self._show_tail()
        elif self._description["verbose"]:
            self._say("the guest was reset")
        return _STATUS.get(how, STATUS_FAILURE)

    def _explain_end(self, status: int) -> None:
        if status == STATUS_TIMEOUT:
            what = "did not end" if self._agent.ready else "did not reach user space"
            self._say(f"the guest {what} in time (after {self._description['timeout_s']:g} s)")
            if not self._agent.ready:
                self._show_tail()

    def _show_tail(self) -> None:
        lines = bytes(self._agent.tail).decode("utf-8", "replace").replace("\r", "").strip().splitlines()
        for line in lines[-_SHOWN_LINES:]:
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def _press(self) -> None:
        """The agent ends the guest in good order, whether or not its kernel has a driver for the button."""
        self._agent.tell("poweroff")

    def _take_signals(self) -> None:
        """The first signal that ends programs is for the command in the guest, once there is one; the second one ends
        the guest. SIGPWR presses the power button."""
        controller = self._controller

        def end(number: int, _frame: object) -> None:
            self._signals += 1
            if self._agent.ready and self._signals == 1:
                self._agent.tell(f"signal {_SIGNALS[number]}")
            elif self._signals <= 2:
                controller.end(STATUS_INTERRUPTED)
            else:
                os._exit(128 + number)

        set_wakeup_fd(controller.wake_fd, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal(number, end)
        signal(SIGWINCH, lambda _number, _frame: self._terminal.resized())
        signal(
            SIGUSR1, lambda _number, _frame: None
        )  # takes processors out of the kernel (mshv.Vp.interrupt)
        signal(SIGPWR, lambda _number, _frame: self._press())
        timeout = self._description["timeout_s"]
        if timeout:
            signal(SIGALRM, lambda _number, _frame: controller.end(STATUS_TIMEOUT))
            setitimer(ITIMER_REAL, timeout)

    def _say(self, text: str) -> None:
        try:
            sys.stderr.write(f"rootvisor: {' '.join(text.split())}\n")
            sys.stderr.flush()
        except OSError:
            pass
