# SPDX-License-Identifier: Apache-2.0
"""The person in front of the machine: power button, escape key, terminal."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from select import select
from typing import IO

import pytest

from tests.kvm.command import DEADLINE_S, RUN, await_processor, bare_kernel


class Terminal:
    """``rootvisor run`` at a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = os.openpty()
        self._slave = slave
        self.before = termios.tcgetattr(slave)
        self.shown = b""
        self.process = subprocess.Popen(
            [*RUN, *arguments], stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        )

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def await_text(self, text: bytes) -> None:
        """Reads until ``text`` has been shown."""
        deadline = time.monotonic() + DEADLINE_S
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown[-2000:]
            assert self.process.poll() is None, self.shown[-2000:]
            if select([self._master], [], [], 1)[0]:
                self.shown += os.read(self._master, 1 << 16)

    def finish(self) -> int:
        """The exit status; the terminal must be as it was."""
        deadline = time.monotonic() + DEADLINE_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.shown[-2000:]
            if select([self._master], [], [], 0.1)[0]:
                self.shown += os.read(self._master, 1 << 16)
        assert termios.tcgetattr(self._slave) == self.before
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self._master)
        os.close(self._slave)


@contextlib.contextmanager
def script(kernel: str, text: str) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """A shell script in the root partition: the process, and what it prints."""
    with subprocess.Popen(
        [*RUN, "--kernel", kernel, "--", "sh", "-c", text],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("kernel", ["stock", "mshv"])
def test_power_button_powers_off(kernel: str) -> None:
    """mshv has the driver of the button, and the agent listens to it; stock has not, and the agent is told."""
    with script(kernel, "echo up; sleep 1000; echo survived") as (process, output):
        assert output.readline() == b"up\n"
        process.send_signal(signal.SIGPWR)
        assert output.read() == b""
        assert process.wait(DEADLINE_S) == 0


def test_escape_key_explains_itself_and_presses_the_power_button() -> None:
    terminal = Terminal("--kernel", "mshv", "--", "sh", "-c", "stty -echo; echo ready; cat -v; echo survived")
    try:
        terminal.await_text(b"ready")
        terminal.type(b"\x1dh")
        terminal.await_text(b"press the power button")
        terminal.type(b"a\x1d\x1db\n")
        terminal.await_text(b"a^]b")
        terminal.type(b"\x1dp")
        assert terminal.finish() == 0
        assert b"survived" not in terminal.shown
    finally:
        terminal.close()


def test_escape_key_ends_a_partition_that_takes_no_input(tmp_path: Path) -> None:
    kernel = bare_kernel(tmp_path / "halt", bytes.fromhex("faf4ebfd"))
    terminal = Terminal("--kernel", str(kernel), "--", "true")
    try:
        await_processor(terminal.process)
        terminal.type(b"anybody?\n" * 100)
        terminal.type(b"\x1dp")
        terminal.await_text(b"does not listen to its power button")
        terminal.type(b"\x1dx")
        assert terminal.finish() == 130
        assert b"Traceback" not in terminal.shown
    finally:
        terminal.close()


def test_second_interrupt_ends_the_run() -> None:
    with script("mshv", "trap 'echo no' INT; echo up; while :; do sleep 1; done") as (process, output):
        assert output.readline() == b"up\n"
        process.send_signal(signal.SIGINT)
        assert output.readline() == b"no\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 130
