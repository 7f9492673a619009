# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from collections.abc import Iterator
from select import poll

import pytest

from rootvisor.chips.serial import INPUT_LIMIT, SerialPort
from rootvisor.machine.serial_input import SerialInput


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    yield read, write
    for fd in (read, write):
        try:
            os.close(fd)
        except OSError:
            pass


def read_all(port: SerialPort) -> bytes:
    found = bytearray()
    while port.read(5, 1) & 1:
        found.append(port.read(0, 1))
    return bytes(found)


def ready(waiting: poll) -> list[int]:
    return [fd for fd, _ in waiting.poll(0)]


def test_what_comes_is_received(pipe: tuple[int, int]) -> None:
    port, waiting = SerialPort(lambda level: None, None), poll()
    one = SerialInput(pipe[0], port)
    one.attach(waiting)
    assert ready(waiting) == []
    os.write(pipe[1], b"root\n")
    assert ready(waiting) == [pipe[0]] and one.handle(pipe[0]) and read_all(port) == b"root\n"
    os.write(pipe[1], b"again\n")
    assert ready(waiting) == [pipe[0]] and one.handle(pipe[0]) and read_all(port) == b"again\n"
    assert not one.handle(pipe[1]), "another's"


def test_a_full_port_is_waited_for_and_nothing_is_lost(pipe: tuple[int, int]) -> None:
    port, waiting = SerialPort(lambda level: None, None), poll()
    one = SerialInput(pipe[0], port)
    one.attach(waiting)
    sent = bytes(number % 251 for number in range(3 * INPUT_LIMIT))
    os.write(pipe[1], sent)
    found = b""
    while len(found) < len(sent):
        for fd in ready(waiting):
            assert one.handle(fd)
        if ready(waiting) == []:
            found += read_all(port)
        one.push()
    assert found == sent


def test_the_end_of_input_is_noticed_once(pipe: tuple[int, int]) -> None:
    port, waiting = SerialPort(lambda level: None, None), poll()
    one = SerialInput(pipe[0], port)
    one.attach(waiting)
    os.write(pipe[1], b"x")
    os.close(pipe[1])
    while fds := ready(waiting):
        one.handle(fds[0])
    assert read_all(port) == b"x" and ready(waiting) == []


def test_a_missing_standard_input_is_none() -> None:
    one = SerialInput(-1, SerialPort(lambda level: None, None))
    one.attach(poll())
    one.push()
    assert not one.handle(0)
