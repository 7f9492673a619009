# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import socket

import pytest

from rootvisor.appliance.sockets import memory_file, served_connection


def test_served_connection_is_the_first_to_be_accepted() -> None:
    listener, client = served_connection()
    with listener, client:
        accepted, _ = listener.accept()
        with accepted:
            client.sendall(b"x")
            assert accepted.recv(1) == b"x"


def test_served_connection_stranger_cannot_get_between() -> None:
    listener, client = served_connection()
    with listener, client, socket.socket(socket.AF_UNIX) as stranger:
        stranger.setblocking(False)
        with pytest.raises(BlockingIOError):
            stranger.connect(listener.getsockname())


def test_memory_file_holds_all_parts() -> None:
    fd = memory_file("test", b"one", b"", b"two" * 100_000)
    try:
        assert os.pread(fd, 1 << 20, 0) == b"one" + b"two" * 100_000
    finally:
        os.close(fd)
