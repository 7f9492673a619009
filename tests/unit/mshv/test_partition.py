# SPDX-License-Identifier: Apache-2.0
"""What the client asks of the driver, field by field."""

from __future__ import annotations

import errno
import os

import pytest

from rootvisor.mshv import Memory, Mshv, MshvError, Partition, abi
from rootvisor.tlfs import hypercalls, status
from tests.unit.mshv.fake_driver import FakeDriver


def test_create_partition_without_features_sends_version_one(mshv: Mshv, driver: FakeDriver) -> None:
    mshv.create_partition(x2apic=False).close()
    request, packed = driver.calls[-1]
    assert (request, len(packed)) == (abi.CREATE_PARTITION, 16)
    assert driver.last(abi.CREATE_PARTITION_V1, request)["pt_flags"] == abi.PT_LAPIC | abi.PT_GPA_SUPER_PAGES


def test_create_partition_with_features_sends_version_two(mshv: Mshv, driver: FakeDriver) -> None:
    mshv.create_partition(disabled_features=(1 << 63, 5), disabled_xsave=9, nested=True, smt=True).close()
    assert driver.last(abi.CREATE_PARTITION_V2, abi.CREATE_PARTITION) == {
        "pt_flags": 0x3F,
        "pt_isolation": 0,
        "pt_num_cpu_fbanks": 2,
        "pt_cpu_fbanks0": 1 << 63,
        "pt_cpu_fbanks1": 5,
        "pt_disabled_xsave": 9,
    }


def test_ioctl_interrupted_by_a_signal_is_made_again(mshv: Mshv, driver: FakeDriver) -> None:
    driver.fail[abi.CREATE_PARTITION] = [errno.EINTR, errno.EINTR]
    mshv.create_partition().close()
    assert [request for request, _ in driver.calls].count(abi.CREATE_PARTITION) == 3


def test_open_without_device_says_what_to_do() -> None:
    with pytest.raises(MshvError) as caught:
        Mshv("/nonexistent/mshv")
    assert str(caught.value).startswith(
        "open failed: no such file or directory (ENOENT); boot a root partition"
    )


def test_map_gives_page_number_address_and_rights(partition: Partition, driver: FakeDriver) -> None:
    with Memory(0x5000) as memory:
        memory.view[0x1000] = 7
        region = partition.map(0x8000, memory, offset=0x1000, size=0x2000, writable=False)
        assert driver.last(abi.USER_MEM_REGION, abi.SET_GUEST_MEMORY) == {
            "size": 0x2000,
            "guest_pfn": 8,
            "userspace_addr": memory.address + 0x1000,
            "flags": abi.SET_MEM_EXECUTABLE,
        }
        region.unmap()
        assert driver.last(abi.USER_MEM_REGION, abi.SET_GUEST_MEMORY) == {
            "size": 0x2000,
            "guest_pfn": 8,
            "userspace_addr": memory.address + 0x1000,
            "flags": abi.SET_MEM_UNMAP,
        }


def test_map_outside_of_memory_is_refused_here(partition: Partition) -> None:
    with Memory(0x2000) as memory:
        with pytest.raises(ValueError, match="are not in"):
            partition.map(0, memory, offset=0x1000, size=0x2000)
        with pytest.raises(ValueError, match="multiple of 4096"):
            partition.map(0x800, memory)


def test_msi_routing_splits_addresses(partition: Partition, driver: FakeDriver) -> None:
    partition.set_msi_routing([(5, 0xFEE0_1000, 0x31), (4095, 0x1_FEE0_0000, 0x32)])
    _, packed = driver.calls[-1]
    assert abi.USER_IRQ_TABLE.unpack(packed[:8]) == (2,)
    assert abi.USER_IRQ_ENTRY.unpack(packed[8:24]) == (5, 0xFEE0_1000, 0, 0x31)
    assert abi.USER_IRQ_ENTRY.unpack(packed[24:]) == (4095, 0xFEE0_0000, 1, 0x32)


def test_irqfd_and_resample(partition: Partition, driver: FakeDriver) -> None:
    partition.add_irqfd(7, 33)
    assert driver.last(abi.USER_IRQFD, abi.IRQFD) == {"fd": 7, "resamplefd": 0, "gsi": 33, "flags": 0}
    partition.add_irqfd(7, 33, resample=8)
    assert driver.last(abi.USER_IRQFD, abi.IRQFD)["flags"] == abi.IRQFD_RESAMPLE
    partition.remove_irqfd(7, 33)
    assert driver.last(abi.USER_IRQFD, abi.IRQFD)["flags"] == abi.IRQFD_DEASSIGN


def test_doorbell_with_and_without_value(partition: Partition, driver: FakeDriver) -> None:
    partition.add_doorbell(0xD000_0000, 9)
    fields = driver.last(abi.USER_IOEVENTFD, abi.IOEVENTFD)
    assert fields == {"datamatch": 0, "addr": 0xD000_0000, "len": 0, "fd": 9, "flags": 0}
    partition.remove_doorbell(0xD000_0000, 9, 4, 0)
    fields = driver.last(abi.USER_IOEVENTFD, abi.IOEVENTFD)
    assert fields["flags"] == abi.IOEVENTFD_DATAMATCH | abi.IOEVENTFD_DEASSIGN
    assert fields["len"] == 4


def test_hypercall_passes_input_output_and_reps(partition: Partition, driver: FakeDriver) -> None:
    driver.answer = lambda code, data, reps: (0, reps, data[::-1])
    assert partition.hypercall(0x94, bytes(range(64)), 64, 3) == bytes(range(63, -1, -1))
    assert driver.hypercalls == [(0x94, bytes(range(64)), 3)]


def test_hypercall_input_is_not_longer_than_given_after_a_long_one(
    partition: Partition, driver: FakeDriver
) -> None:
    partition.hypercall(0x94, b"\xff" * 4096)
    partition.hypercall(0x94, bytes(8))
    assert driver.hypercalls[-1][1] == bytes(8)


def test_hypercall_larger_than_a_page_is_refused_here(partition: Partition) -> None:
    with pytest.raises(ValueError, match="at most 4096"):
        partition.hypercall(0x94, bytes(4097))
    with pytest.raises(ValueError, match="at most 4096"):
        partition.hypercall(0x94, bytes(8), 4097)


def test_hypercall_refused_by_hypervisor_names_call_status_and_mend(
    partition: Partition, driver: FakeDriver
) -> None:
    driver.answer = lambda code, data, reps: (status.INVALID_PARTITION_STATE, 0, b"")
    with pytest.raises(MshvError) as caught:
        partition.set_property(0x10001, 1)
    assert caught.value.status == status.INVALID_PARTITION_STATE
    assert str(caught.value) == (
        "MSHV_ROOT_HVCALL(HVCALL_SET_PARTITION_PROPERTY) failed: HV_STATUS_INVALID_PARTITION_STATE (EINVAL); "
        "initialize the partition first; early properties go before that"
    )


def test_hypercall_refused_by_driver_has_no_status(partition: Partition, driver: FakeDriver) -> None:
    driver.fail[abi.ROOT_HVCALL] = [errno.EINVAL]
    with pytest.raises(MshvError) as caught:
        partition.hypercall(0x53, bytes(8))
    assert caught.value.status is None
    assert "the driver does not pass this call on" in str(caught.value)


def test_access_states_are_read_in_pieces(partition: Partition, driver: FakeDriver) -> None:
    driver.answer = lambda code, data, reps: (0, reps, bytes([2] * reps))
    assert partition.access_states(0x10000, 5000) == bytes([2] * 5000)
    assert [(code, reps) for code, _, reps in driver.hypercalls] == [(0xC9, 4095), (0xC9, 905)]
    assert driver.hypercalls[1][1] == bytes(16) + (16 + 4095).to_bytes(8, "little")


def test_access_bitmap_argument(partition: Partition, driver: FakeDriver) -> None:
    assert partition.access_bitmap(0x3000, 9) == bytes(2)
    fields = driver.last(abi.GPAP_ACCESS_BITMAP, abi.GET_GPAP_ACCESS_BITMAP)
    assert (fields["access_type"], fields["access_op"], fields["page_count"], fields["gpap_base"]) == (
        1,
        1,
        9,
        3,
    )
    assert fields["bitmap_ptr"] % 4096 == 0


def test_assert_interrupt_input(partition: Partition, driver: FakeDriver) -> None:
    partition.assert_interrupt(0x41, 7, level=True, logical=True)
    code, data, _ = driver.hypercalls[-1]
    assert code == hypercalls.ASSERT_VIRTUAL_INTERRUPT
    assert data == bytes(8) + bytes([0, 0, 0, 0, 3, 0, 0, 0, 7]) + bytes(7) + bytes([0x41]) + bytes(7)


def test_post_message_builds_the_slot(partition: Partition, driver: FakeDriver) -> None:
    partition.post_message(1, 2, 0x55, b"abc")
    code, data, _ = driver.hypercalls[-1]
    assert (code, len(data)) == (hypercalls.POST_MESSAGE_DIRECT, 280)
    assert data[20:40] == b"\x55\0\0\0\x03" + bytes(11) + b"abc\0"
    with pytest.raises(ValueError, match="240"):
        partition.post_message(1, 2, 1, bytes(241))


def test_register_cpuid_without_subleaf_is_not_specific(partition: Partition, driver: FakeDriver) -> None:
    partition.register_cpuid(7, eax=1, masks=(1, 2, 3, 4))
    _, data, _ = driver.hypercalls[-1]
    assert len(data) == 60
    assert data[8:12] == b"\xff" * 4
    assert data[24:26] == b"\0\1"
    partition.register_cpuid(7, 0, vp=2)
    assert driver.hypercalls[-1][1][24:26] == b"\1\1"


def test_closing_twice_is_allowed(mshv: Mshv) -> None:
    partition = mshv.create_partition()
    partition.close()
    partition.close()
    with pytest.raises(OSError):
        os.fstat(partition.fd)
