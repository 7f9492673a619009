# SPDX-License-Identifier: Apache-2.0
"""Properties of partitions: values, times when they can be set, and the clock that two of them rule."""

from __future__ import annotations

import struct
import threading
import time

import pytest

from rootvisor.hypervisor.child_features import ASSIGNABLE
from rootvisor.tlfs import hypercalls as hv
from rootvisor.tlfs import intercepts, msrs, registers, status
from rootvisor.tlfs import partition_properties as tlfs
from tests.kvm.guest import Guest
from tests.kvm.parent import Child, Parent

QEMU_FEATURES = 0x06400FFB
OPENVMM_FEATURES = 0x7F448FFF
OUT_80 = b"\xe6\x80"
SPIN = b"\xeb\xfe"
#: 100 ns units
MS = 10_000


@pytest.fixture
def parent(guest: Guest) -> Parent:
    return Parent(guest)


# --- values -----------------------------------------------------------------------------------------------------------
READABLE = (
    tlfs.PROCESSOR_VENDOR, tlfs.PHYSICAL_ADDRESS_WIDTH, tlfs.PROCESSOR_CLOCK_FREQUENCY, tlfs.XSAVE_FEATURES,
    tlfs.XSAVE_STATES, tlfs.MAX_XSAVE_DATA_SIZE, tlfs.PROCESSOR_FEATURES0, tlfs.PROCESSOR_FEATURES1,
)  # fmt: skip


def test_what_a_child_has_is_what_the_root_was_told(parent: Parent) -> None:
    child = parent.create()
    for code in READABLE:
        answer = parent.get(hv.SELF, code)
        assert answer[0] == 0
        assert parent.get(1, code) == answer
        assert parent.get(child.id, code) == answer, f"{code:#x}"
        assert parent.set(child.id, code, 0) == status.ACCESS_DENIED
    assert parent.get(hv.SELF, tlfs.PHYSICAL_ADDRESS_WIDTH)[1] in range(32, 53)
    assert parent.get(hv.SELF, tlfs.MAX_XSAVE_DATA_SIZE)[1] in range(576, 4097)
    assert parent.get(hv.SELF, tlfs.PROCESSOR_CLOCK_FREQUENCY)[1] > 10**8
    assert parent.get(hv.SELF, tlfs.XSAVE_STATES)[1] & 3 == 3


def test_unknown_properties(parent: Parent) -> None:
    child = parent.create()
    for partition in (hv.SELF, child.id):
        for code in (0, 0x10002, 0x60005, 0xFFFF_FFFF):
            assert parent.get(partition, code)[0] == status.UNKNOWN_PROPERTY
            assert parent.get_ex(partition, code)[0] == status.UNKNOWN_PROPERTY
    assert parent.set(child.id, 0x60005, 0) == status.UNKNOWN_PROPERTY
    assert parent.set(hv.SELF, tlfs.TIME_FREEZE, 1) == status.OPERATION_DENIED
    assert parent.get(77, tlfs.PROCESSOR_VENDOR)[0] == status.INVALID_PARTITION_ID
    assert parent.set(77, tlfs.TIME_FREEZE, 0) == status.INVALID_PARTITION_ID
    assert parent.get(hv.SELF, tlfs.TIME_FREEZE)[0] == status.UNKNOWN_PROPERTY


def test_banked_properties(parent: Parent) -> None:
    for code, bank in (
        (tlfs.VMM_CAPABILITIES, 1 << 4),
        (tlfs.ASSIGNABLE_SYNTHETIC_PROC_FEATURES, ASSIGNABLE),
    ):
        result, value = parent.get_ex(hv.SELF, code)
        assert result == 0
        assert struct.unpack_from("<HHIQ", value) == (1, 0, 0, bank)
        assert not any(value[16:])
    result, value = parent.get_ex(hv.SELF, tlfs.PROCESSOR_FEATURES0)
    assert (result, value[:8]) == (0, parent.get(hv.SELF, tlfs.PROCESSOR_FEATURES0)[1].to_bytes(8, "little"))
    assert not any(value[8:])


def test_values_that_can_be_set(parent: Parent) -> None:
    child = parent.create()
    for code, good, bad in (
        (tlfs.UNIMPLEMENTED_MSR_ACTION, 1, 2),
        (tlfs.GPA_PAGE_ACCESS_TRACKING, 1, 2),
        (tlfs.TIME_FREEZE, 1, 2),
        (tlfs.PROCESSORS_PER_SOCKET, 4, None),
    ):
        assert parent.get(child.id, code) == (0, 0)
        assert parent.set(child.id, code, good) == 0
        assert parent.get(child.id, code) == (0, good)
        if bad is not None:
            assert parent.set(child.id, code, bad) == status.PROPERTY_VALUE_OUT_OF_RANGE
        assert parent.get(child.id, code) == (0, good)
        assert parent.set(child.id, code, 0) == 0


@pytest.mark.parametrize("features", [0, 3, QEMU_FEATURES, OPENVMM_FEATURES, hv.SELF])
def test_synthetic_features_are_kept_and_only_what_exists_is_shown(parent: Parent, features: int) -> None:
    child = parent.create()
    assert parent.set(child.id, tlfs.SYNTHETIC_PROC_FEATURES, features) == 0
    assert child.deposit(8) == 0
    assert child.initialize() == 0
    assert parent.get(child.id, tlfs.SYNTHETIC_PROC_FEATURES) == (0, features)
    assert child.create_vp(0) == 0
    leaves = cpuid(child, 1, 0x40000000, 0x40000001, 0x40000003)
    if features & 3 != 3:
        assert not leaves[0][2] >> 31
        assert leaves[1:] == [(0, 0, 0, 0)] * 3
        return
    assert leaves[0][2] >> 31 & 1
    assert leaves[1] == (0x40000006, 0x7263694D, 0x666F736F, 0x76482074)
    assert leaves[2][0] == 0x31237648
    privileges = leaves[3][0] | leaves[3][1] << 32
    # nothing that is not there: direct timers, timers, guest idle
    assert not privileges & (1 << 3 | 1 << 10 | 1 << 7)
    assert not leaves[3][3] & 1 << 19
    wanted = features & ASSIGNABLE
    for bit, privilege in ((3, 1), (4, 2), (6, 4), (7, 5), (8, 6), (9, 9), (11, 11)):
        assert privileges >> privilege & 1 == wanted >> bit & 1, f"feature {bit}"
    assert not privileges >> 32 & 0x1F0F, "nothing of a root"


def cpuid(child: Child, *leaves: int) -> list[tuple[int, int, int, int]]:
    data = struct.pack("<QIIQ", child.id, 0, 2, 0) + b"".join(
        struct.pack("<IIQQ", leaf, 0, 3, 0) for leaf in leaves
    )
    answer = child.guest.call(hv.GET_VP_CPUID_VALUES, data, count=len(leaves), output=16 * len(leaves))
    assert answer.status == 0
    return list(struct.iter_unpack("<4I", answer.output))


# --- time -------------------------------------------------------------------------------------------------------------
def now(child: Child) -> int:
    result, value = child.parent.get(child.id, tlfs.REFERENCE_TIME)
    assert result == 0
    return value


def freeze(child: Child, frozen: bool = True) -> None:
    assert child.parent.set(child.id, tlfs.TIME_FREEZE, int(frozen)) == 0


def test_reference_time_starts_at_creation_and_goes_on_without_vps(parent: Parent) -> None:
    begin = time.monotonic()
    child = parent.initialized()
    first = now(child)
    time.sleep(0.3)
    second = now(child)
    passed = (time.monotonic() - begin) * 1e7
    assert first < second <= passed + MS
    assert second - first >= 300 * MS


def test_reference_time_is_the_guests_tsc(parent: Parent) -> None:
    child = parent.initialized(vps=2)
    hertz = parent.get(hv.SELF, tlfs.PROCESSOR_CLOCK_FREQUENCY)[1]
    before = now(child)
    tscs = [child.register(index, registers.TSC) for index in range(2)]
    after = now(child)
    for tsc in tscs:
        assert before - 10 <= tsc * 10**7 // hertz <= after + 10


def test_reference_time_of_a_running_vp_does_not_wait_for_it(parent: Parent) -> None:
    child = parent.initialized(vps=1)
    child.load(SPIN)
    child.resume()
    times = [now(child) for _ in range(5)]
    assert times == sorted(times)
    assert child.suspend() == 0
    assert child.register(0, registers.INTERCEPT_SUSPEND) == 0


def test_frozen_time_stands(parent: Parent) -> None:
    child = parent.initialized(vps=1)
    freeze(child)
    first = now(child), child.register(0, registers.TSC)
    time.sleep(0.3)
    assert (now(child), child.register(0, registers.TSC)) == first
    assert child.deposit(2) == 0
    assert child.create_vp(1) == 0
    assert child.register(1, registers.TSC) == first[1]
    freeze(child)  # twice is once
    hertz = parent.get(hv.SELF, tlfs.PROCESSOR_CLOCK_FREQUENCY)[1]
    thaw = time.monotonic()
    freeze(child, False)
    freeze(child, False)
    begin = time.monotonic()
    after = now(child), child.register(0, registers.TSC)
    other = child.register(1, registers.TSC)
    went_on = time.monotonic() - thaw + 0.01
    assert 0 <= after[0] - first[0] < went_on * 1e7
    assert 0 <= after[1] - first[1] < went_on * hertz
    assert 0 <= other - after[1] < hertz * (time.monotonic() - begin + 0.01)


def test_reference_time_can_be_set(parent: Parent) -> None:
    child = parent.initialized(vps=1)
    freeze(child)
    assert parent.set(child.id, tlfs.REFERENCE_TIME, 5_000_000_000) == 0
    assert now(child) in (4_999_999_999, 5_000_000_000)
    assert child.set_registers(0, (registers.TSC, 1 << 40)) == 0
    assert child.register(0, registers.TSC) == 1 << 40
    assert now(child) in (4_999_999_999, 5_000_000_000)
    thaw = time.monotonic()
    freeze(child, False)
    assert 5_000_000_000 - 1 <= now(child) < 5_000_000_000 + (time.monotonic() - thaw + 0.01) * 1e7
    assert child.register(0, registers.TSC) >> 40 == 1


def test_guest_computes_reference_time_from_a_tsc_that_was_set_while_time_stood(parent: Parent) -> None:
    """A restore: reference time first, then the TSC of each VP. What the guest's page says must agree with both."""
    child = parent.initialized(vps=2)
    freeze(child)
    assert parent.set(child.id, tlfs.REFERENCE_TIME, 5_000_000_000) == 0
    for index in range(2):
        assert child.set_registers(index, (registers.TSC, (1 << 40) + index)) == 0
    partition = parent.guest.hypervisor.partitions[child.id]
    page = bytearray(4096)
    partition.reference_time.write_page(memoryview(page))
    scale, offset = struct.unpack_from("<Qq", page, 8)
    assert abs(((1 << 40) * scale >> 64) + offset - 5_000_000_000) <= 10
    freeze(child, False)
    begin = time.monotonic()
    tsc = child.register(0, registers.TSC)
    assert 0 <= now(child) - ((tsc * scale >> 64) + offset) < (time.monotonic() - begin + 0.01) * 1e7


def test_frozen_vps_do_not_run(parent: Parent) -> None:
    """A VP that runs leaves the guest; one that is resumed waits for the thaw; neither register shows it."""
    child = parent.initialized(vps=2)
    counter = 0x5000
    child.load(b"\xff\x06" + struct.pack("<H", counter) + b"\xeb\xfa")  # inc word [counter]; jmp
    child.enter(1)
    assert child.set_registers(1, (registers.INTERNAL_ACTIVITY_STATE, 0)) == 0
    memory = child.memory(counter)
    child.resume(0)
    wait_until(lambda: any(memory[:2]))
    freeze(child)
    child.resume(1)
    seen = bytes(memory[:2])
    time.sleep(0.1)
    assert bytes(memory[:2]) == seen
    for index in range(2):
        assert child.register(index, registers.EXPLICIT_SUSPEND) == 0
        assert child.register(index, registers.INTERCEPT_SUSPEND) == 0
    assert child.suspend(1) == 0
    freeze(child, False)
    wait_until(lambda: bytes(memory[:2]) != seen)
    assert child.suspend(0) == 0
    seen = bytes(memory[:2])
    time.sleep(0.05)
    assert bytes(memory[:2]) == seen, "VP 1 was suspended"
    child.resume(1)
    wait_until(lambda: bytes(memory[:2]) != seen)


def wait_until(true: object, seconds: float = 10.0) -> None:
    assert callable(true)
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


LAPIC_TIMER = 0x320
ONE_SHOT_CODE = (
    b"\x0f\x31"  # rdtsc
    b"\x66\xa3\x00\x50"  # mov [0x5000], eax
    b"\x66\x89\x16\x04\x50"  # mov [0x5004], edx
    b"\xe6\x80"  # out 0x80, al
)


def test_a_guest_does_not_see_that_time_stood(parent: Parent) -> None:
    child = parent.initialized(vps=1)
    child.load(ONE_SHOT_CODE * 2)
    stamps = []
    begin = time.monotonic()
    for turn in range(2):
        kind, payload = child.run()
        assert kind == intercepts.X64_IO_PORT_INTERCEPT
        stamps.append(int.from_bytes(child.memory(0x5000)[:8], "little"))
        child.skip(0, payload)
        if not turn:
            freeze(child)
            time.sleep(0.5)
            freeze(child, False)
    hertz = parent.get(hv.SELF, tlfs.PROCESSOR_CLOCK_FREQUENCY)[1]
    assert 0 < (stamps[1] - stamps[0]) / hertz < time.monotonic() - begin - 0.45


@pytest.mark.parametrize("mode", ["one-shot", "deadline"])
def test_an_apic_timer_keeps_what_it_had_left(parent: Parent, mode: str) -> None:
    """A second was left when time froze; it is left when it goes on."""
    child = parent.initialized(vps=1)
    hertz = parent.get(hv.SELF, tlfs.PROCESSOR_CLOCK_FREQUENCY)[1]
    handler, vector = 0x3000, 0x40
    child.load(b"\xfb\xf4\xeb\xfd")  # sti; hlt; jmp back
    child.memory(0x1000)  # keep the page
    child.memory(vector * 4)[:4] = struct.pack("<HH", handler, 0)
    child.memory(handler)[:2] = OUT_80
    child_vp = parent.guest.hypervisor.children()[0].vps[0]
    set_at = time.monotonic()
    tsc = child.register(0, registers.TSC)
    with parent.guest.hypervisor.lock:
        vcpu = child_vp.vcpu
        lapic = vcpu.lapic()
        lapic[0xF0:0xF4] = struct.pack("<I", 0x1FF)
        lapic[0x3E0:0x3E4] = struct.pack("<I", 0xB)
        lapic[LAPIC_TIMER : LAPIC_TIMER + 4] = struct.pack(
            "<I", vector | (2 << 17 if mode == "deadline" else 0)
        )
        if mode == "one-shot":
            lapic[0x380:0x384] = lapic[0x390:0x394] = struct.pack("<I", 1_000_000_000)
        vcpu.set_lapic(lapic)
        if mode == "deadline":
            assert vcpu.set_msr(0x6E0, tsc + hertz)
    child.resume()
    time.sleep(0.2)
    freeze(child)
    left = 1.0 - (
        time.monotonic() - set_at
    )  # at least; nothing is shown by a host that needed a second until here
    before = child_vp.intercept_suspend
    time.sleep(1.5)
    assert child_vp.intercept_suspend == before and (left < 0 or not before), "it ran out while time stood"
    thawed = time.monotonic()
    freeze(child, False)
    assert child.message()[0] == intercepts.X64_IO_PORT_INTERCEPT
    assert time.monotonic() - thawed > left - 0.01, "it did not wait for what it had left"


def test_freezing_from_two_vps_at_once(guest2: Guest) -> None:
    parent = Parent(guest2)
    child = parent.initialized(vps=2)
    child.load(SPIN)
    child.resume()
    failures: list[int] = []

    def turn(vp: int) -> None:
        data = [hv.SET_PARTITION_PROPERTY_INPUT.pack(child.id, tlfs.TIME_FREEZE, value) for value in (1, 0)]
        for number in range(60):
            at = 0x900000 + vp * 0x8000
            guest2.ram[at : at + 24] = data[number & 1]
            answer = guest2.call(hv.SET_PARTITION_PROPERTY, input_gpa=at, output_gpa=at + 0x1000, vp=vp)
            if answer.status:
                failures.append(answer.status)

    threads = [threading.Thread(target=turn, args=(vp,)) for vp in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    freeze(child, False)
    assert child.parent.guest.hypervisor.children()[0].held == 0
    assert child.suspend() == 0
    assert child.finalize() == 0


def test_tracking_of_a_running_vp(parent: Parent) -> None:
    child = parent.initialized(vps=1)
    counter = 0x5000
    child.load(b"\xff\x06" + struct.pack("<H", counter) + b"\xeb\xfa")
    child.resume()
    memory = child.memory(counter)
    wait_until(lambda: any(memory[:2]))
    for value in (1, 0):
        assert parent.set(child.id, tlfs.GPA_PAGE_ACCESS_TRACKING, value) == 0
        seen = bytes(memory[:2])
        wait_until(lambda seen=seen: bytes(memory[:2]) != seen)
    assert child.register(0, registers.EXPLICIT_SUSPEND) == 0
    assert child.suspend() == 0


def test_unknown_msrs_by_property(parent: Parent) -> None:
    child = parent.initialized(vps=1)
    child.load(b"\x66\xb9\x34\x12\x00\x40\x0f\x32\xe6\x80")  # mov ecx, 0x40001234; rdmsr; out
    child.memory(13 * 4)[:4] = struct.pack("<HH", 0x3000, 0)
    child.memory(0x3000)[:4] = b"\xb0\x99" + OUT_80
    assert child.port_write(child.run()[1])[1] & 0xFF == 0x99, (
        "a synthetic MSR that does not exist raises #GP"
    )
    assert msrs.FIRST == 0x40000000
