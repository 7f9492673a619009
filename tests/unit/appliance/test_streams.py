# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import socket
import threading

from rootvisor.appliance.streams import Input, Output

DEADLINE_S = 10


def received(sock: socket.socket) -> bytes:
    data = b""
    sock.settimeout(DEADLINE_S)
    while chunk := sock.recv(1 << 16):
        data += chunk
    return data


def test_input_end_is_passed_on_behind_the_data() -> None:
    ours, theirs = socket.socketpair()
    reading, writing = os.pipe()
    with ours, theirs:
        thread = Input(reading, ours)
        thread.start()
        os.write(writing, b"\0binary\xff\n")
        os.close(writing)
        assert received(theirs) == b"\0binary\xff\n"
        thread.close()
        os.close(reading)


def test_input_close_ends_a_silent_input() -> None:
    ours, theirs = socket.socketpair()
    reading, writing = os.pipe()
    with ours, theirs:
        thread = Input(reading, ours)
        thread.start()
        thread.close()
        assert not thread.is_alive()
        os.close(reading)
        os.close(writing)


def test_input_closed_descriptor_is_an_end() -> None:
    ours, theirs = socket.socketpair()
    reading, writing = os.pipe()
    with ours, theirs:
        thread = Input(reading, ours)
        os.close(reading)
        os.close(writing)
        thread.start()
        assert received(theirs) == b""
        thread.close()


def test_output_slow_reader_loses_nothing() -> None:
    ours, theirs = socket.socketpair()
    reading, writing = os.pipe()
    data = os.urandom(1 << 20)
    with ours:
        output = Output(ours, writing, lambda: None)
        output.start()
        with theirs:
            sender = threading.Thread(target=theirs.sendall, args=(data,))
            sender.start()
            got = b""
            while len(got) < len(data):
                got += os.read(reading, 4096)
            sender.join(DEADLINE_S)
        output.join(DEADLINE_S)
        assert got == data
        assert not output.is_alive()
    os.close(reading)
    os.close(writing)


def test_output_reader_gone_is_told_once_and_drained() -> None:
    ours, theirs = socket.socketpair()
    reading, writing = os.pipe()
    os.close(reading)
    calls: list[int] = []
    with ours:
        output = Output(ours, writing, lambda: calls.append(1))
        output.start()
        with theirs:
            theirs.sendall(b"x" * 1_000_000)
        output.join(DEADLINE_S)
        assert calls == [1]
        assert output.received == 1_000_000
    os.close(writing)
