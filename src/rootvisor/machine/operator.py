# SPDX-License-Identifier: Apache-2.0
"""What the person in front of the machine does to it: keys, signals, the power button, the size of the window."""

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
from select import POLLIN

from ..virtio.terminal import HELP, Keyboard, RawTerminal, terminal_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from select import poll

    from ..chips.power import PowerManagement
    from ..hypervisor.computer_partition import ComputerPartition
    from ..virtio.console import Console
    from .console_wiring import Consoles

_ENDING = {SIGINT: "INT", SIGTERM: "TERM", SIGHUP: "HUP"}


class Operator:
    """Watches signals, and the terminal at standard input if ``tty``.

    ``begin`` starts it; whoever polls then calls :meth:`handle`. The first signal that ends programs is for the
    command in the partition, once ``agent_ready`` says that one runs there; the second one ends the run. SIGPWR
    presses the power button.
    """

    def __init__(self, consoles: Consoles, *, tty: bool) -> None:
        self._consoles = consoles
        self._signal_read, self._signal_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._keyboard = Keyboard(0, self._key) if tty else None
        if self._keyboard is not None:
            consoles.terminal_input = self._keyboard.output
        self._terminal: RawTerminal | None = None
        self._interrupts = 0

    def begin(
        self,
        waiting: poll,
        partition: ComputerPartition,
        power: PowerManagement,
        window: Console | None,
        agent_ready: Callable[[], bool],
    ) -> None:
        """Takes over signals and terminal. ``window``: the console that is told of the window's size."""
        self._partition = partition
        self._power = power
        self._window = window
        self._agent_ready = agent_ready
        for number in (*_ENDING, SIGUSR1, SIGPWR, SIGWINCH):
            signal(number, _noted)
        set_wakeup_fd(self._signal_write)
        waiting.register(self._signal_read, POLLIN)
        if self._keyboard is not None:
            self._terminal = RawTerminal()
            self._keyboard.attach(waiting)

    def handle(self, fd: int) -> bool:
        """Does what there is to do at ``fd``; false when it is none of ours."""
        if fd == self._signal_read:
            try:
                numbers = os.read(fd, 64)
            except BlockingIOError:
                return True
            for number in numbers:
                self._signalled(number)
            return True
        return self._keyboard is not None and self._keyboard.handle(fd)

    def _signalled(self, number: int) -> None:
        if number == SIGWINCH:
            size = terminal_size()
            if size is not None and self._window is not None:
                self._window.resize(*size)
        elif number == SIGPWR:
            self.press_power_button()
        elif number in _ENDING:
            self._interrupts += 1
            if self._agent_ready() and self._interrupts == 1:
                self._consoles.tell_agent(f"signal {_ENDING[number]}")
            else:
                self._partition.end("signal", f"signal {number}")

    def _key(self, name: str) -> None:
        if name == "power":
            self.press_power_button()
        elif name == "end":
            self._partition.end("signal", "Ctrl-] x")
        else:
            self._say(HELP)

    def press_power_button(self) -> None:
        """Has the partition power off in good order: through its kernel, or through the agent where the kernel has no
        driver for the button."""
        if self._power.button_enabled:
            self._power.press_power_button()
        elif self._agent_ready():
            self._consoles.tell_agent("poweroff")
        else:
            self._say("rootvisor: the root partition does not listen to its power button yet")

    def _say(self, text: str) -> None:
        """A line for the user, whose terminal may be raw."""
        sys.stderr.write(f"\r\n{text}\r\n" if self._terminal is not None else f"{text}\n")
        sys.stderr.flush()

    def end(self) -> None:
        """Gives the terminal back."""
        if self._terminal is not None:
            self._terminal.restore()
            self._terminal = None

    def close(self) -> None:
        """Gives everything back; safe at any time."""
        set_wakeup_fd(-1)
        self.end()
        if self._keyboard is not None:
            self._keyboard.close()
            self._keyboard = None
        os.close(self._signal_read)
        os.close(self._signal_write)


def _noted(_number: int, _frame: object) -> None:
    """A handler must exist: SIGUSR1 then interrupts KVM_RUN, the others reach the wake-up descriptor."""
