# SPDX-License-Identifier: Apache-2.0
"""Processors: registers by name, runs, interruption, state."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from rootvisor.mshv import MshvError, RegisterPage, Segment, Table, Vp, abi, vp
from rootvisor.tlfs import hypercalls, registers, status
from tests.unit.mshv.fake_driver import FakeDriver


def test_get_registers_by_name_and_number(processor: Vp, driver: FakeDriver) -> None:
    driver.answer = lambda code, data, reps: (
        0,
        reps,
        b"".join(i.to_bytes(16, "little") for i in range(reps)),
    )
    assert processor.get_registers("rip", "XMM3", "sint15", registers.CR3) == [0, 1, 2, 3]
    code, data, reps = driver.hypercalls[-1]
    assert (code, reps) == (hypercalls.GET_VP_REGISTERS, 4)
    assert data[8:12] == b"\3\0\0\0"
    names = memoryview(data[16:]).cast("I").tolist()
    assert names == [registers.RIP, registers.XMM0 + 3, registers.SINT0 + 15, registers.CR3]


@pytest.mark.parametrize(
    "name", ["ripp", "xmm16", "sint", "page_rip", "dirty_rip", "Layout", "pending", "xmm"]
)
def test_unknown_register_name_is_a_key_error(processor: Vp, name: str) -> None:
    with pytest.raises(KeyError, match="no register"):
        processor.get_registers(name)


def test_many_registers_go_in_several_calls(processor: Vp, driver: FakeDriver) -> None:
    driver.answer = lambda code, data, reps: (0, reps, bytes(16 * reps))
    assert len(processor.get_registers(*([registers.RAX] * 300))) == 300
    assert [reps for _, _, reps in driver.hypercalls] == [128, 128, 44]


def test_set_registers_keeps_order_and_takes_segments(processor: Vp, driver: FakeDriver) -> None:
    processor.set_registers({registers.CR0: 0x31}, rip=0x1000, cs=Segment.code64(), gdtr=Table(0x2000, 0x17))
    code, data, reps = driver.hypercalls[-1]
    assert (code, reps) == (hypercalls.SET_VP_REGISTERS, 4)
    elements = [data[at : at + 32] for at in range(16, len(data), 32)]
    assert [int.from_bytes(one[:4], "little") for one in elements] == [
        registers.CR0,
        registers.RIP,
        registers.CS,
        registers.GDTR,
    ]
    assert elements[2][16:] == bytes(8) + b"\xff\xff\xff\xff\x08\x00\x9b\xa0"
    assert elements[3][16:] == bytes(6) + b"\x17\0" + b"\0\x20" + bytes(6)


def test_set_registers_refused_says_how_many_were_set(processor: Vp, driver: FakeDriver) -> None:
    calls = iter([(0, 127, b""), (status.INVALID_REGISTER_VALUE, 2, b"")])
    driver.answer = lambda code, data, reps: next(calls)
    with pytest.raises(MshvError) as caught:
        processor.set_registers(dict.fromkeys(range(1000, 1130), 0))
    assert caught.value.reps == 129
    assert "HV_STATUS_INVALID_REGISTER_VALUE" in str(caught.value)


def test_segment_and_table_survive_the_trip() -> None:
    for segment in (Segment(0x1234_5678_9ABC_DEF0, 0xFFFF_FFFF, 0x10, 0xC093), Segment.real_code(0xF000)):
        assert Segment.from_value(int(segment)) == segment
    assert Segment.real_code(0xF000, 0xFFFF_0000).base == 0xFFFF_0000
    assert Table.from_value(int(Table(0xFFFF_8000_0000_0000, 0xFFF))) == Table(0xFFFF_8000_0000_0000, 0xFFF)


def test_run_interrupted_returns_none(processor: Vp, driver: FakeDriver) -> None:
    driver.fail[abi.RUN_VP] = [errno.EINTR]
    assert processor.run() is None
    assert processor.run() is not None


def test_run_refused_is_an_error(processor: Vp, driver: FakeDriver) -> None:
    driver.fail[abi.RUN_VP] = [errno.EIO]
    with pytest.raises(MshvError, match="MSHV_RUN_VP failed"):
        processor.run()


def test_interrupt_before_run_makes_it_return_at_once(processor: Vp, driver: FakeDriver) -> None:
    assert processor.interrupt()
    assert processor.run() is None
    assert not [request for request, _ in driver.calls if request == abi.RUN_VP]
    assert processor.run() is not None


@pytest.fixture
def quiet_usr1() -> Iterator[None]:
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    yield
    signal.signal(signal.SIGUSR1, before)


def test_interrupt_of_a_running_thread(
    processor: Vp, monkeypatch: pytest.MonkeyPatch, quiet_usr1: None
) -> None:
    """The fake ioctl sleeps, as the driver does, in a call that a signal ends."""
    libc = ctypes.CDLL(None, use_errno=True)

    def sleep(fd: int, request: int, argument: bytearray) -> int:
        if libc.usleep(5_000_000):
            raise InterruptedError(errno.EINTR, "")
        return 0

    monkeypatch.setattr(vp, "ioctl", sleep)
    results = []
    thread = threading.Thread(target=lambda: results.append(processor.run()))
    started = time.monotonic()
    thread.start()
    time.sleep(0.05)
    assert processor.interrupt()
    thread.join(5)
    assert results == [None]
    assert time.monotonic() - started < 4


def test_register_page_sets_dirty_classes() -> None:
    memory = mmap.mmap(-1, 4096)
    memory[0:3] = b"\1\0\1"
    memory[0x160:0x168] = (0x8000_0011).to_bytes(8, "little")
    page = RegisterPage(memory)
    assert page.valid
    assert page.version == 1
    assert page.cr0 == 0x8000_0011
    page.rip = 0xFFFF_FFFF_FFFF_FFFF + 5
    assert page.rip == 4
    assert page.dirty == registers.DIRTY_RIP
    page.r15 = 7
    page.set_general(1, -1)
    assert page.rcx == 0xFFFF_FFFF_FFFF_FFFF
    assert page.general(15) == 7
    page.rflags |= 2
    page.set_xmm(5, 1 << 127)
    assert page.xmm(5) == 1 << 127
    page.ss = Segment.data()
    assert page.ss == Segment.data()
    assert memory[0x120:0x130] == int(Segment.data()).to_bytes(16, "little")
    assert page.dirty == 0x1F
    with pytest.raises(AttributeError, match="takes only"):
        page.cr0 = 1
    with pytest.raises(ValueError, match="XMM0 to XMM5"):
        page.xmm(6)


def test_state_of_unexpected_size_is_read_with_a_larger_buffer(
    processor: Vp, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def answer(self: Vp, request: int, argument: int | bytes | bytearray = 0) -> int:
        assert isinstance(argument, bytearray)
        kind, size, pointer = abi.VP_STATE_ARGUMENT.unpack(argument)
        assert pointer % 4096 == 0
        sizes.append(size)
        argument[:] = abi.VP_STATE_ARGUMENT.pack(kind, 5000, pointer)
        if size < 5000:
            raise MshvError("MSHV_GET_VP_STATE", errno.EINVAL)
        ctypes.memset(pointer, 0x5A, 5000)
        return 0

    monkeypatch.setattr(Vp, "ioctl", answer)
    assert processor.get_state(1) == b"\x5a" * 5000
    assert sizes == [4096, 8192]


def test_vp_closed_twice(processor: Vp) -> None:
    fd = processor.fd
    processor.close()
    processor.close()
    with pytest.raises(OSError):
        os.fstat(fd)
