# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import fcntl
import os
import pty
from collections.abc import Iterator
from pathlib import Path

import pytest

from rootvisor.virtio import stream
from rootvisor.virtio.stream import InputStream, OutputStream, advance

Pipe = tuple[int, int]


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pair = os.pipe()
    yield pair
    for fd in pair:
        try:
            os.close(fd)
        except OSError:
            pass


def fill(output: OutputStream) -> int:
    total = 0
    while count := output.write([memoryview(bytes(100_000))]):
        total += count
    return total


def is_nonblocking(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK)


def test_pipe_write_stops_when_full_without_touching_its_flags(pipe: Pipe) -> None:
    output = OutputStream(pipe[1])
    assert fill(output) >= 4096
    assert not is_nonblocking(pipe[1])
    output.close()


def test_pipe_without_nowait_is_written_in_safe_pieces(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr(os, "pwritev", refuse)
    monkeypatch.setattr(os, "preadv", refuse)
    output, source = OutputStream(pipe[1]), InputStream(pipe[0])
    data = [memoryview(b"x" * 10_000)]
    assert output.write(data) == 0 and output.small
    assert output.write(data) == 4096
    assert source.read_into([memoryview(bytearray(5000))]) == 4096
    output.close()
    source.close()


def test_pipe_read_gives_data_then_none_then_end(pipe: Pipe) -> None:
    source = InputStream(pipe[0])
    buffer = bytearray(8)
    assert source.read_into([memoryview(buffer)]) is None
    os.write(pipe[1], b"abc")
    assert source.read_into([memoryview(buffer)[:2], memoryview(buffer)[2:]]) == 3
    os.close(pipe[1])
    assert source.read_into([memoryview(buffer)]) == 0
    source.close()


def test_write_to_closed_pipe_is_os_error(pipe: Pipe) -> None:
    output = OutputStream(pipe[1])
    os.close(pipe[0])
    with pytest.raises(BrokenPipeError):
        output.write([memoryview(b"x")])
    output.close()


def test_regular_files_are_read_and_written_at_their_position(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        output = OutputStream(file.fileno())
        assert output.write([memoryview(b"ab"), memoryview(b"cd")]) == 4
        assert output.write([memoryview(b"ef")]) == 2
        output.close()
    with path.open("rb") as file:
        source = InputStream(file.fileno())
        buffer = bytearray(4)
        assert source.read_into([memoryview(buffer)]) == 4
        assert source.read_into([memoryview(buffer)]) == 2
        assert source.read_into([memoryview(buffer)]) == 0
        source.close()


@pytest.mark.parametrize("own", [True, False], ids=["reopened", "shared"])
def test_terminal_is_never_set_nonblocking_and_never_blocks(
    own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    master, terminal = pty.openpty()
    if not own:

        def refuse(*_: object) -> int:
            raise PermissionError

        monkeypatch.setattr(os, "open", refuse)
    output = OutputStream(terminal)
    assert output.small is not own
    if own:
        assert fill(output) > 0
    else:
        assert output.write([memoryview(bytes(5000))]) <= stream._SAFE_TERMINAL_WRITE
    assert not is_nonblocking(terminal)
    output.close()
    os.close(master)
    os.close(terminal)


def test_terminal_read_with_nothing_there_is_none() -> None:
    master, terminal = pty.openpty()
    source = InputStream(terminal)
    buffer = memoryview(bytearray(8))
    assert source.read_into([buffer]) is None
    os.write(master, b"hi\n")
    assert source.read_into([buffer]) == 3
    assert not is_nonblocking(terminal)
    os.close(master)
    assert source.read_into([buffer]) == 0
    source.close()
    os.close(terminal)


def test_advance_skips_whole_and_partial_buffers() -> None:
    views = [memoryview(b"abc"), memoryview(b""), memoryview(b"defg")]
    assert b"".join(advance(views, 0)) == b"abcdefg"
    assert b"".join(advance(views, 3)) == b"defg"
    assert b"".join(advance(views, 5)) == b"fg"
    assert advance(views, 7) == []
