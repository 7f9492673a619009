# SPDX-License-Identifier: Apache-2.0
"""An ordinary partition: what CPUID promises, and that exactly this is there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rootvisor.hypervisor.guest_partition import GUEST_FEATURES, GUEST_PRIVILEGES, GUEST_RECOMMENDATIONS
from rootvisor.tlfs import cpuid, msrs, privileges, status
from rootvisor.tlfs import hypercalls as hv
from tests.kvm import guest as g
from tests.kvm.guest import driven
from tests.kvm.ordinary import Ordinary

row = pytest.mark.row


@pytest.fixture(scope="module")
def ordinary() -> Iterator[Ordinary]:
    """Two VPs; these tests only look."""
    yield from driven(Ordinary(vps=2))


@row("CPU-01")
def test_hypervisor_present_on_every_vp(ordinary: Ordinary) -> None:
    assert all(ordinary.cpuid(1, vp=vp)[2] >> 31 for vp in (0, 1))


@row("CPU-02")
def test_vendor_and_highest_leaf(ordinary: Ordinary) -> None:
    highest, *vendor = ordinary.cpuid(0x40000000)
    assert 0x40000005 <= highest <= 0x4000FFFF
    assert b"".join(word.to_bytes(4, "little") for word in vendor) == b"Microsoft Hv"


@row("CPU-03")
def test_interface_signature(ordinary: Ordinary) -> None:
    assert ordinary.cpuid(0x40000001) == (0x31237648, 0, 0, 0)


@row("CPU-04")
def test_version(ordinary: Ordinary) -> None:
    version = ordinary.partition.hypervisor.version
    assert ordinary.cpuid(0x40000002) == (version.build, version.major << 16 | version.minor, 0, 0)


@row("CPU-05", "CPU-07")
def test_privileges_and_features_are_those_that_are_enforced_on_every_vp(ordinary: Ordinary) -> None:
    partition = ordinary.partition
    for vp in (0, 1):
        low, high, _ecx, features = ordinary.cpuid(0x40000003, vp=vp)
        assert (low | high << 32, features) == (partition.privileges, partition.features)
    given = partition.privileges | privileges.ACCESS_TSC_INVARIANT_CONTROLS  # which not every KVM can give
    assert (given, partition.features) == (GUEST_PRIVILEGES, GUEST_FEATURES)


@row("CPU-06")
def test_reserved_and_power_bits_read_zero(ordinary: Ordinary) -> None:
    assert ordinary.cpuid(0x40000003)[2] == 0


@row("CPU-08")
def test_recommendations_name_calls_that_work(ordinary: Ordinary) -> None:
    recommended = ordinary.cpuid(0x40000004)[0]
    assert recommended == ordinary.partition.recommendations
    assert recommended & ~cpuid.RECOMMEND_APIC_MSRS == GUEST_RECOMMENDATIONS
    assert ordinary.wrmsr_fault(msrs.EOI, 0) == 0
    assert ordinary.call(hv.FLUSH_VIRTUAL_ADDRESS_SPACE, hv.FLUSH_INPUT.pack(0, 7, 0)).status == 0
    assert ordinary.call(hv.SEND_IPI, hv.SEND_IPI_INPUT.pack(0x40, 0, bytes(3), 0)).status == 0
    assert ordinary.call(hv.SEND_IPI_EX, hv.SEND_IPI_EX_INPUT.pack(0x40, 0, bytes(3), 0, 0)).status == 0


@row("CPU-09", "MSC-03")
def test_spin_retries_are_never(ordinary: Ordinary) -> None:
    assert ordinary.cpuid(0x40000004)[1:] == (0xFFFFFFFF, 0, 0)


@row("CPU-10")
def test_limits(ordinary: Ordinary) -> None:
    most, processors, vectors, _ = ordinary.cpuid(0x40000005)
    assert (most, processors, vectors) == (64, 64, 0)


@row("CPU-11", "CPU-12", "CPU-13", "CPU-14", "CPU-15", "CPU-16", "NST-01", "NST-02", "NST-03", "NST-04")
@pytest.mark.parametrize(
    "leaf",
    [
        0x40000006,
        0x40000007,
        0x40000008,
        0x40000009,
        0x4000000A,
        0x4000000B,
        0x4000000C,
        *range(0x40000080, 0x40000083),
    ],
)
def test_leaves_of_what_is_not_offered_are_zero(ordinary: Ordinary, leaf: int) -> None:
    assert ordinary.cpuid(leaf) == (0, 0, 0, 0)


@row("PRV-15", "PRV-18", "PRV-19", "PRV-25", "VSM-01")
def test_privileges_of_a_root_and_of_what_is_not_offered_are_clear(ordinary: Ordinary) -> None:
    low, high, _ecx, features = ordinary.cpuid(0x40000003)
    granted = low | high << 32
    for refused in (
        privileges.CREATE_PARTITIONS, privileges.ACCESS_PARTITION_ID, privileges.ACCESS_MEMORY_POOL,
        privileges.ADJUST_MESSAGE_BUFFERS, privileges.CREATE_PORT, privileges.ACCESS_STATS, privileges.CPU_MANAGEMENT,
        privileges.CONFIGURE_PROFILER, privileges.CONNECT_PORT, privileges.DEBUGGING, privileges.ACCESS_VSM,
        privileges.ISOLATION, privileges.ACCESS_STATS_REG, privileges.ACCESS_DEBUG_REGS,
        privileges.ACCESS_REENLIGHTENMENT_CONTROLS,
    ):  # fmt: skip
        assert not granted & refused
    assert not features & (1 << 6 | 1 << 9 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 23)


MSRS = {
    "PRV-00": (privileges.ACCESS_VP_RUNTIME, [msrs.VP_RUNTIME]),
    "PRV-01": (privileges.ACCESS_PARTITION_REFERENCE_COUNTER, [msrs.TIME_REF_COUNT]),
    "PRV-02": (
        privileges.ACCESS_SYNIC_REGS,
        [*range(0x40000080, 0x40000085), *range(0x40000090, 0x400000A0)],
    ),
    "PRV-03": (privileges.ACCESS_SYNTHETIC_TIMER_REGS, list(range(0x400000B0, 0x400000B8))),
    "PRV-04": (privileges.ACCESS_INTR_CTRL_REGS, [msrs.ICR, msrs.TPR, msrs.VP_ASSIST_PAGE]),
    "PRV-05": (privileges.ACCESS_HYPERCALL_MSRS, [msrs.GUEST_OS_ID, msrs.HYPERCALL]),
    "PRV-06": (privileges.ACCESS_VP_INDEX, [msrs.VP_INDEX]),
    "PRV-07": (privileges.ACCESS_RESET_REG, [msrs.RESET]),
    "PRV-09": (privileges.ACCESS_PARTITION_REFERENCE_TSC, [msrs.REFERENCE_TSC]),
    "PRV-10": (privileges.ACCESS_GUEST_IDLE_REG, [msrs.GUEST_IDLE]),
    "PRV-11": (privileges.ACCESS_FREQUENCY_REGS, [msrs.TSC_FREQUENCY, msrs.APIC_FREQUENCY]),
    "PRV-14": (privileges.ACCESS_TSC_INVARIANT_CONTROLS, [msrs.TSC_INVARIANT_CONTROL]),
}


@row(
    "PRV-00",
    "PRV-01",
    "PRV-02",
    "PRV-03",
    "PRV-04",
    "PRV-05",
    "PRV-06",
    "PRV-07",
    "PRV-09",
    "PRV-10",
    "PRV-11",
    "PRV-14",
)
def test_every_msr_is_there_with_its_privilege_and_faults_without(usable_kvm: None) -> None:
    """One guest with all privileges, and one with none of these: nothing else may depend on them."""
    everything = 0
    for privilege, _indices in MSRS.values():
        everything |= privilege
    with Ordinary() as guest, Ordinary(privileges=GUEST_PRIVILEGES & ~everything) as without:
        for name, (privilege, indices) in MSRS.items():
            for index in indices:
                if index != msrs.GUEST_IDLE:  # it would sleep
                    offered = privilege & guest.partition.privileges  # KVM may not have what one needs
                    assert guest.rdmsr_fault(index) == (0 if offered else g.GP), (name, hex(index))
                assert without.rdmsr_fault(index) == g.GP, (name, hex(index))
                assert without.wrmsr_fault(index, 0) == g.GP, (name, hex(index))


@row(
    "PRV-00",
    "PRV-01",
    "PRV-02",
    "PRV-03",
    "PRV-04",
    "PRV-05",
    "PRV-06",
    "PRV-07",
    "PRV-09",
    "PRV-10",
    "PRV-11",
    "PRV-14",
)
@pytest.mark.parametrize("name", sorted(MSRS))
def test_an_msr_faults_without_its_own_privilege_alone(usable_kvm: None, name: str) -> None:
    privilege, indices = MSRS[name]
    with Ordinary(privileges=GUEST_PRIVILEGES & ~privilege) as guest:
        assert all(guest.rdmsr_fault(index) == g.GP for index in indices)
        assert guest.cpuid(0x40000003)[0] == guest.partition.privileges & 0xFFFFFFFF
        assert not guest.partition.privileges & privilege


@row(
    "PRV-08",
    "PRV-12",
    "MSR-22",
    "MSR-23",
    "MSR-25",
    "MSR-31",
    "MSR-33",
    "MSR-09",
    "MSC-04",
    "MSC-07",
    "TMR-14",
    "NST-05",
    "PRV-13",
    "MSR-28",
    "MSR-29",
    "MSR-30",
    "NST-06",
)
@pytest.mark.parametrize(
    "indices",
    [
        pytest.param(range(0xE0, 0xE4), id="statistics"),
        pytest.param((*range(0xF1, 0xF6), 0xFF), id="debugger"),
        pytest.param((*range(0xC1, 0xC4), *range(0xD1, 0xD4)), id="power states"),
        pytest.param((0x114, 0x115), id="unhalted timer"),
        pytest.param((0x1002, *range(0x1080, 0x1085), *range(0x1090, 0x10A0)), id="nested"),
        pytest.param((0x40,), id="NPIEP"),
        pytest.param((0x106, 0x107, 0x108), id="reenlightenment"),
        pytest.param((4, 0xF, 0x24, 0x74, 0x86, 0xA0, 0xB8, 0x109, 0x1FF, 0x1FFF), id="never defined"),
    ],
)
def test_msrs_of_what_is_not_offered_fault(ordinary: Ordinary, indices: tuple[int, ...]) -> None:
    for offset in indices:
        assert ordinary.rdmsr_fault(msrs.FIRST + offset) == g.GP
        assert ordinary.wrmsr_fault(msrs.FIRST + offset, 0) == g.GP


@row("PRV-16", "PRV-17", "PRV-21", "PRV-23", "PRV-24", "HC-13")
def test_calls_are_denied_without_their_privileges_before_anything_else_is_looked_at(
    usable_kvm: None,
) -> None:
    lacking = (
        privileges.POST_MESSAGES | privileges.SIGNAL_EVENTS | privileges.ACCESS_VP_REGISTERS
        | privileges.ENABLE_EXTENDED_HYPERCALLS | privileges.START_VIRTUAL_PROCESSOR
    )  # fmt: skip
    with Ordinary(privileges=GUEST_PRIVILEGES & ~lacking) as guest:
        guest.enable_hypercalls()
        for code in (
            hv.POST_MESSAGE,
            hv.SIGNAL_EVENT,
            hv.EXT_QUERY_CAPABILITIES,
            0x8041,
            hv.START_VIRTUAL_PROCESSOR,
            hv.GET_PARTITION_ID,
        ):
            result = guest.call(code, reserved=1 << 27, input_gpa=0x123)
            assert result.status == status.ACCESS_DENIED, hex(code)
        header = hv.VP_REGISTERS_INPUT.pack(hv.SELF, 0, 0, bytes(3))
        assert (
            guest.call(hv.GET_VP_REGISTERS, header + bytes(4), output=16, count=1).status
            == status.ACCESS_DENIED
        )
        lookup = hv.GET_VP_INDEX_FROM_APIC_ID_INPUT.pack(hv.SELF, 0) + bytes(4)
        assert (
            guest.call(hv.GET_VP_INDEX_FROM_APIC_ID, lookup, output=4, count=1).status == status.ACCESS_DENIED
        )


@row("PRV-20")
@pytest.mark.parametrize("offered", [True, False])
def test_extended_ranges_are_a_known_flag_only_with_their_feature(usable_kvm: None, offered: bool) -> None:
    features = GUEST_FEATURES if offered else GUEST_FEATURES & ~privileges.FEATURE_EXTENDED_GVA_RANGES
    with Ordinary(features=features) as guest:
        guest.enable_hypercalls()
        data = hv.FLUSH_INPUT.pack(0, 3 | 8, 0) + bytes(8)
        answer = guest.call(hv.FLUSH_VIRTUAL_ADDRESS_LIST, data, count=1).status
        assert answer == (0 if offered else status.INVALID_PARAMETER)


@row("PRV-22")
def test_register_output_needs_its_feature_and_its_privilege(usable_kvm: None) -> None:
    for lacking in (
        {"features": GUEST_FEATURES & ~privileges.FEATURE_XMM_OUTPUT},
        {"privileges": GUEST_PRIVILEGES & ~privileges.FAST_HYPERCALL_OUTPUT},
    ):
        with Ordinary(**lacking) as guest:
            guest.enable_hypercalls()
            data = hv.GET_VP_INDEX_FROM_APIC_ID_INPUT.pack(hv.SELF, 0) + bytes(4)
            assert guest.fast(hv.GET_VP_INDEX_FROM_APIC_ID, data, count=1).op.fault == g.UD
    with Ordinary() as guest:
        guest.enable_hypercalls()
        result = guest.fast(hv.GET_VP_INDEX_FROM_APIC_ID, data, count=1)
        assert (result.op.fault, result.status, result.reps) == (0, 0, 1)
