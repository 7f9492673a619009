# SPDX-License-Identifier: Apache-2.0
"""Where the guest's consoles lead, and input on its way to the serial port."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from rootvisor.chips.serial import SerialPort
from rootvisor.vmm.consoles import SerialInput, Stream

DATA, LINE_STATUS = 0, 5
DATA_READY = 1


@pytest.mark.parametrize("mode", ["Off", "Null"])
def test_console_that_leads_nowhere_has_no_descriptors(mode: str) -> None:
    stream = Stream({"mode": mode}, 0)
    assert stream.present == (mode != "Off")
    assert stream.input is None and stream.output is None
    stream.close()


def test_terminal_is_standard_output_and_the_input_that_is_given() -> None:
    stream = Stream({"mode": "Tty"}, 9)
    assert (stream.input, stream.output, stream.tty) == (9, 1, True)
    stream.close()
    os.fstat(1)


def test_file_takes_output_and_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("of an earlier guest")
    stream = Stream({"mode": "File", "file": str(path)}, 0)
    assert stream.input is None and stream.output is not None
    os.write(stream.output, b"new")
    fd = stream.output
    stream.close()
    assert path.read_text() == "new"
    with pytest.raises(OSError):
        os.fstat(fd)


def test_pseudo_terminal_carries_bytes_as_they_are() -> None:
    stream = Stream({"mode": "Pty"}, 0)
    assert stream.output is not None
    user = os.open(stream.path, os.O_RDWR | os.O_NOCTTY)
    os.write(user, b"a\rb\x03\n")
    assert os.read(stream.output, 100) == b"a\rb\x03\n"
    os.write(stream.output, b"x\ny")
    assert os.read(user, 100) == b"x\ny"
    os.close(user)
    stream.close()


def test_input_reaches_the_serial_port_as_fast_as_the_guest_reads() -> None:
    port = SerialPort(lambda _level: None, None, buffered=False)
    port.write(2, 1, 1)  # FIFO on
    reader, writer = os.pipe()
    feeder = SerialInput(port, reader)
    text = bytes(range(1, 251)) * 8
    os.write(writer, text)
    received = b""
    deadline = time.monotonic() + 30
    while len(received) < len(text):
        assert time.monotonic() < deadline
        if port.read(LINE_STATUS, 1) & DATA_READY:
            received += bytes([port.read(DATA, 1)])
        else:
            time.sleep(0.0002)
    assert received == text
    os.close(writer)
    feeder.close()
    os.close(reader)


def test_end_of_input_is_no_busy_loop() -> None:
    port = SerialPort(lambda _level: None, None, buffered=False)
    reader, writer = os.pipe()
    feeder = SerialInput(port, reader)
    os.close(writer)
    spent = time.process_time()
    until = time.monotonic() + 0.2
    while time.monotonic() < until:
        time.sleep(0.05)
    assert time.process_time() - spent < 0.1
    feeder.close()
    os.close(reader)
