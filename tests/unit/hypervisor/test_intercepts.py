# SPDX-License-Identifier: Apache-2.0
"""Payloads of intercept messages at the offsets that VMMs read (contract child-partitions 5.1, 5.2); what installs."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import Any

import pytest

from rootvisor.hypervisor import intercepts
from rootvisor.hypervisor.errors import HvError
from rootvisor.hypervisor.intercepts import InstalledIntercepts
from rootvisor.kvm import abi
from rootvisor.tlfs import hypercalls, status
from rootvisor.tlfs import intercepts as tlfs

CODE = bytes(range(0x10, 0x20))
REGISTERS = {name: 0x1000 + number for number, name in enumerate(abi.REGS)}


def segment(vp: Any, at: int, *fields: int) -> None:
    """base, limit, selector, type, present, dpl, db, s, l, g, avl"""
    struct.pack_into("<QIHBBBBBBBB", vp.u8, abi.SYNC_SREGS_AT + at, *fields)


@pytest.fixture
def vp() -> Any:
    run = memoryview(bytearray(4096))
    made = SimpleNamespace(index=5, u8=run, u64=run.cast("Q"), u32=run.cast("I"))
    for number, value in enumerate(REGISTERS.values()):
        made.u64[abi.SYNC_REGS_AT // 8 + number] = value
    sregs = abi.SYNC_SREGS_AT
    segment(made, abi.SREGS_CS, 0, 0xFFFFFFFF, 0x33, 0xB, 1, 3, 0, 1, 1, 1, 0)
    segment(made, abi.SREGS_DS, 0x1000, 0xFFFF, 0x2B, 3, 1, 3, 1, 1, 0, 0, 1)
    segment(made, abi.SREGS_ES, 0x2000, 0xFFFFF, 0x23, 1, 1, 0, 1, 1, 0, 1, 0)
    segment(made, abi.SREGS_SS, 0x3000, 0xFFFF, 0x18, 7, 1, 3, 1, 1, 0, 0, 0)
    made.u64[(sregs + abi.SREGS_CR0) // 8] = 0x80050033
    made.u64[(sregs + abi.SREGS_CR8) // 8] = 9
    made.u64[(sregs + abi.SREGS_EFER) // 8] = 0x500
    made.vcpu = SimpleNamespace(fpu=lambda: bytearray(range(256)) + bytearray(160))
    return made


def u(payload: bytes, at: int, size: int = 8) -> int:
    return int.from_bytes(payload[at : at + size], "little")


def check_header(payload: bytes, length: int, access: int) -> None:
    assert u(payload, 0, 4) == 5
    assert u(payload, 4, 1) == length | 9 << 4
    assert u(payload, 5, 1) == access
    assert u(payload, 8) == 0
    assert (u(payload, 16, 4), u(payload, 20, 2), u(payload, 22, 2)) == (0xFFFFFFFF, 0x33, 0xA0FB)
    assert (u(payload, 24), u(payload, 32)) == (REGISTERS["rip"], REGISTERS["rflags"])


def test_header(vp: Any) -> None:
    payload = intercepts.plain(vp)
    assert len(payload) == 40
    check_header(payload, 0, tlfs.ACCESS_EXECUTE)
    assert u(payload, 6, 2) == 3 | tlfs.STATE_CR0_PE | tlfs.STATE_CR0_AM | tlfs.STATE_EFER_LMA


@pytest.mark.parametrize(
    ("at", "bit"),
    [
        (abi.EVENTS_SHADOW, tlfs.STATE_INTERRUPT_SHADOW),
        (abi.EVENTS_EXCEPTION_INJECTED, tlfs.STATE_INTERRUPTION_PENDING),
        (abi.EVENTS_EXCEPTION_PENDING, tlfs.STATE_INTERRUPTION_PENDING),
        (abi.EVENTS_INTERRUPT_INJECTED, tlfs.STATE_INTERRUPTION_PENDING),
        (abi.EVENTS_NMI_INJECTED, tlfs.STATE_INTERRUPTION_PENDING),
    ],
)
def test_execution_state_of_events(vp: Any, at: int, bit: int) -> None:
    before = u(intercepts.plain(vp), 6, 2)
    vp.u8[abi.SYNC_EVENTS_AT + at] = 1
    assert u(intercepts.plain(vp), 6, 2) == before | bit


def test_execution_state_of_real_mode(vp: Any) -> None:
    segment(vp, abi.SREGS_SS, 0, 0xFFFF, 0, 3, 1, 0, 0, 1, 0, 0, 0)
    for register in (abi.SREGS_CR0, abi.SREGS_EFER):
        vp.u64[(abi.SYNC_SREGS_AT + register) // 8] = 0x10
    assert u(intercepts.plain(vp), 6, 2) == 0


def test_io_port(vp: Any) -> None:
    payload = intercepts.io_port(vp, 0x3F8, True, 2 | tlfs.IO_STRING | tlfs.IO_REP, 3, CODE)
    assert len(payload) == 128
    check_header(payload, 3, tlfs.ACCESS_WRITE)
    assert (u(payload, 40, 2), u(payload, 42, 1), u(payload, 43, 1), u(payload, 44, 4)) == (
        0x3F8,
        0x1A,
        16,
        0,
    )
    assert u(payload, 48) == REGISTERS["rax"]
    assert payload[56:72] == CODE
    assert (u(payload, 72), u(payload, 80, 4), u(payload, 84, 2), u(payload, 86, 2)) == (
        0x1000,
        0xFFFF,
        0x2B,
        0x50F3,
    )
    assert (u(payload, 88), u(payload, 96, 4), u(payload, 100, 2), u(payload, 102, 2)) == (
        0x2000, 0xFFFFF, 0x23, 0xC091,
    )  # fmt: skip
    assert [u(payload, at) for at in (104, 112, 120)] == [REGISTERS[name] for name in ("rcx", "rsi", "rdi")]


def test_memory(vp: Any) -> None:
    payload = intercepts.memory(vp, tlfs.ACCESS_READ, 3, 0xFFFF8000_00001234, 0xFED00234, 7, CODE[:9])
    assert len(payload) == 80
    check_header(payload, 7, tlfs.ACCESS_READ)
    assert (u(payload, 40, 4), u(payload, 44, 1), u(payload, 45, 1), u(payload, 46, 1)) == (0, 9, 3, 9)
    assert (u(payload, 48), u(payload, 56)) == (0xFFFF8000_00001234, 0xFED00234)
    assert payload[64:80] == CODE[:9] + bytes(7)


def test_msr(vp: Any) -> None:
    payload = intercepts.msr(vp, 0xC0000080, True)
    assert len(payload) == 64
    check_header(payload, 2, tlfs.ACCESS_WRITE)
    assert (u(payload, 40, 4), u(payload, 48), u(payload, 56)) == (
        0xC0000080,
        REGISTERS["rdx"],
        REGISTERS["rax"],
    )


def test_exception(vp: Any) -> None:
    payload = intercepts.exception(vp, 3, 0xABC, True, 1, CODE)
    assert len(payload) == 240
    check_header(payload, 1, tlfs.ACCESS_EXECUTE)
    assert (u(payload, 40, 2), u(payload, 42, 1), u(payload, 43, 1), u(payload, 44, 4)) == (3, 2, 16, 0)
    assert u(payload, 48) == 0xABC
    assert payload[64:80] == CODE
    assert (u(payload, 80), u(payload, 96)) == (0x1000, 0x3000)
    order = (
        "rax",
        "rcx",
        "rdx",
        "rbx",
        "rsp",
        "rbp",
        "rsi",
        "rdi",
        *(f"r{number}" for number in range(8, 16)),
    )
    assert [u(payload, 112 + 8 * n) for n in range(16)] == [REGISTERS[name] for name in order]


def test_hypercall(vp: Any) -> None:
    payload = intercepts.hypercall(vp)
    assert len(payload) == 200
    check_header(payload, 3, tlfs.ACCESS_EXECUTE)
    order = ("rax", "rbx", "rcx", "rdx", "r8", "rsi", "rdi")
    assert [u(payload, 40 + 8 * n) for n in range(7)] == [REGISTERS[name] for name in order]
    assert payload[96:192] == bytes(range(152, 248))  # XMM0-5 of struct kvm_fpu


def test_message_without_header(vp: Any) -> None:
    assert intercepts.invalid_register(vp) == struct.pack("<II", 5, 0)


# --- what can be installed ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "parameter"),
    [
        (tlfs.TYPE_IO_PORT, 0x3F8),
        (tlfs.TYPE_IO_PORT_RANGE, 0x3F8 | 0x3FF << 16),
        (tlfs.TYPE_CPUID, 0x100),
        (tlfs.TYPE_GLOBAL_CPUID, 0x101),
        (tlfs.TYPE_APIC_EOI, 0),
        (tlfs.TYPE_MSR, 0),
        (tlfs.TYPE_MSR_INDEX, 0xC0000080),
        (tlfs.TYPE_EXCEPTION, 1),
        (tlfs.TYPE_EXCEPTION, 3),
        (tlfs.TYPE_HYPERCALL, 0),
        (tlfs.TYPE_UNKNOWN_SYNIC_CONNECTION, 0),
        (tlfs.TYPE_RETARGET_WITH_UNKNOWN_DEVICE_ID, 0),
    ],
)
def test_install_and_take_back(kind: int, parameter: int) -> None:
    installed = InstalledIntercepts()
    empty = {name: getattr(installed, name) for name in installed.__slots__}
    empty = {name: dict(value) if isinstance(value, dict) else value for name, value in empty.items()}
    installed.install(4, kind, parameter)
    assert installed.recorded == {(kind, parameter): 4}
    installed.install(0, kind, parameter)
    assert {name: getattr(installed, name) for name in installed.__slots__} == empty


@pytest.mark.parametrize(
    ("mask", "kind", "parameter", "expected"),
    [
        (8, tlfs.TYPE_IO_PORT, 0, status.INVALID_PARAMETER),
        (4, 0x77, 0, status.INVALID_PARAMETER),
        (4, tlfs.TYPE_EXCEPTION, 32, status.INVALID_PARAMETER),
        (4, tlfs.TYPE_EXCEPTION, 14, status.FEATURE_UNAVAILABLE),
        (1, tlfs.TYPE_MSR_INDEX, 0x830, status.FEATURE_UNAVAILABLE),
        (2, tlfs.TYPE_APIC_INIT_SIPI, 0, status.FEATURE_UNAVAILABLE),
        (2, tlfs.TYPE_APIC_WRITE, 0, status.FEATURE_UNAVAILABLE),
        (2, tlfs.TYPE_REGISTER, 0, status.FEATURE_UNAVAILABLE),
    ],
)
def test_install_refused(mask: int, kind: int, parameter: int, expected: int) -> None:
    installed = InstalledIntercepts()
    with pytest.raises(HvError) as refused:
        installed.install(mask, kind, parameter)
    assert refused.value.status == expected
    assert not installed.recorded


def test_hypercalls_that_are_the_roots() -> None:
    installed = InstalledIntercepts()
    asked = [
        (0x1234, status.INVALID_HYPERCALL_CODE),
        (hypercalls.POST_MESSAGE, status.INVALID_CONNECTION_ID),
        (hypercalls.SIGNAL_EVENT, status.INVALID_CONNECTION_ID),
        (hypercalls.RETARGET_DEVICE_INTERRUPT, status.INVALID_DEVICE_ID),
        (hypercalls.POST_MESSAGE, status.ACCESS_DENIED),
        (0x1234, status.SUCCESS),
    ]
    seen = [installed.any_hypercall]
    assert [installed.wants(*one) for one in asked] == [False] * 6
    installed.install(4, tlfs.TYPE_HYPERCALL, 0)
    seen.append(installed.any_hypercall)
    assert [installed.wants(*one) for one in asked] == [True] + [False] * 5
    installed.install(4, tlfs.TYPE_UNKNOWN_SYNIC_CONNECTION, 0)
    installed.install(4, tlfs.TYPE_RETARGET_WITH_UNKNOWN_DEVICE_ID, 0)
    assert [installed.wants(*one) for one in asked] == [True] * 4 + [False] * 2
    assert seen == [False, True]
