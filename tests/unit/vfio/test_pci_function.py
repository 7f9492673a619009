# SPDX-License-Identifier: Apache-2.0
"""An assigned function on a device that is a model of one: an NVMe-like BAR with table and pending bits, MSI, PM."""

from __future__ import annotations

import random
import struct

import pytest

from rootvisor.pci import registers as reg
from rootvisor.pci.root import PciRoot
from rootvisor.vfio import abi
from rootvisor.vfio.device import Region
from rootvisor.vfio.errors import VfioError
from rootvisor.vfio.pci_function import AssignedFunction
from tests.unit.virtio.guest_side import Platform, Vector

ECAM = 0xE0000000
PM, MSI, MSIX, VENDOR = 0x40, 0x50, 0x70, 0x90
MMIO = (0x8000000000, 1 << 30)


class FakeDevice:
    """What VfioDevice does, on bytes."""

    def __init__(
        self, vectors: int = 4, bar_bytes: int = 0x4000, table: int = 0x2000, pba: int = 0x3000
    ) -> None:
        self.address = "0000:01:00.0"
        self.space = space = bytearray(4096)
        struct.pack_into("<HHHHBBH", space, 0, 0x1B36, 0x0010, 0, reg.STATUS_CAPABILITY_LIST, 2, 2, 0x0108)
        struct.pack_into("<I", space, reg.BAR_0, 0xFEB00000 | reg.BAR_MEMORY_64 | reg.BAR_PREFETCHABLE)
        struct.pack_into("<HH", space, reg.SUBSYSTEM_VENDOR_ID, 0x1AF4, 0x1100)
        space[reg.CAPABILITY_POINTER] = PM
        space[PM : PM + 4] = bytes((reg.CAP_POWER, MSI, 3, 0))
        space[MSI : MSI + 4] = bytes((reg.CAP_MSI, MSIX, 0x86, 0))  # wide, eight messages
        struct.pack_into("<BBHII", space, MSIX, reg.CAP_MSIX, VENDOR, vectors - 1, table, pba)
        space[VENDOR : VENDOR + 4] = bytes((reg.CAP_VENDOR, 0, 8, 0xAA))
        struct.pack_into("<I", space, 0x100, 0x0001 | 1 << 16 | 0x140 << 20)  # error reporting
        struct.pack_into("<I", space, 0x140, 0x0010 | 1 << 16 | 0x180 << 20)  # SR-IOV
        struct.pack_into("<I", space, 0x180, 0x0003 | 1 << 16)  # serial number
        self.bar = bytearray(bar_bytes)
        self.rom = b""
        self.regions = [Region(0, 0, []) for _ in range(8)]
        self.regions[0] = Region(bar_bytes, 0, [(0, bar_bytes)] if bar_bytes >= 4096 else [])
        self.regions[abi.REGION_CONFIG] = Region(4096, 1 << 40, [])
        self.unmask = -1
        self.connected: dict[tuple[int, int], int] = {}
        self.resets = 0
        self.closed = False
        self.can_grow = True
        self.fails = False

    def read(self, region: int, offset: int, size: int) -> int:
        where = {abi.REGION_CONFIG: self.space, abi.REGION_ROM: self.rom}.get(region, self.bar)
        return int.from_bytes(where[offset : offset + size], "little")

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        where = self.space if region == abi.REGION_CONFIG else self.bar
        where[offset : offset + size] = value.to_bytes(size, "little")

    def config(self, offset: int, size: int) -> int:
        return self.read(abi.REGION_CONFIG, offset, size)

    def map(self, region: int, offset: int, size: int) -> int:
        return 0x7F0000000000 + offset

    def rom_address(self) -> int:
        return 0x7E0000000000

    def irq_count(self, index: int) -> tuple[int, bool]:
        return 4, self.can_grow

    def connect(self, index: int, start: int, eventfds: list[int]) -> None:
        if self.fails:
            raise VfioError("its interrupts cannot be had", "try again")
        for number, fd in enumerate(eventfds, start):
            if fd >= 0:
                self.connected[index, number] = fd

    def connect_unmask(self, index: int, eventfd: int) -> None:
        self.unmask = eventfd

    def disconnect(self, index: int) -> None:
        self.connected = {key: fd for key, fd in self.connected.items() if key[0] != index}

    def reset(self) -> bool:
        self.resets += 1
        return True

    def close(self) -> None:
        self.closed = True


class Line:
    raised, lowered = 100, 101
    closed = False

    def close(self) -> None:
        self.closed = True


class DevicePlatform(Platform):
    def __init__(self) -> None:
        super().__init__()
        self.shown: dict[int, tuple[int, int, int]] = {}
        self.handle = 0
        self.lines: list[tuple[int, int, Line]] = []

    def interrupt_line(self, bdf: int, pin: int) -> Line:
        line = Line()
        self.lines.append((bdf, pin, line))
        return line

    def map_device_memory(self, gpa: int, size: int, address: int, readonly: bool = False) -> int:
        assert readonly == (address == 0x7E0000000000)
        for base, length, _ in self.shown.values():
            assert not (gpa < base + length and base < gpa + size)
        self.handle += 1
        self.shown[self.handle] = (gpa, size, address)
        return self.handle

    def unmap_device_memory(self, handle: int) -> None:
        del self.shown[handle]


def masked(vector: Vector) -> bool:
    return vector.masked


class Assigned:
    def __init__(self, device: FakeDevice | None = None) -> None:
        self.device = device or FakeDevice()
        self.platform = DevicePlatform()
        self.root = PciRoot(self.platform, ECAM, (0xC0000000, 0x20000000), MMIO)
        self.problems: list[str] = []
        self.function = AssignedFunction(self.device, self.platform, self.problems.append)  # type: ignore[arg-type]
        self.root.add(self.function, 4)
        self.root.assign_bars()

    def enable(self) -> None:
        self.function.config_write(reg.COMMAND, 2, reg.COMMAND_MEMORY | reg.COMMAND_BUS_MASTER)

    @property
    def base(self) -> int:
        return self.function.bar_address(self.function.bars[0])

    def mmio(self, offset: int, size: int) -> int:
        return self.platform.mmio.read(self.base + offset, size)

    def set_mmio(self, offset: int, size: int, value: int) -> None:
        self.platform.mmio.write(self.base + offset, size, value)


def test_ids_class_and_capabilities_are_the_devices() -> None:
    one = Assigned()
    read = one.function.config_read
    assert (read(0, 4), read(reg.CLASS_CODE, 3), read(reg.SUBSYSTEM_VENDOR_ID, 4)) == (
        0x00101B36,
        0x010802,
        0x11001AF4,
    )
    chain, at = [], read(reg.CAPABILITY_POINTER, 1)
    while at:
        chain.append((read(at, 1), at))
        at = read(at + 1, 1)
    assert chain == [(reg.CAP_POWER, PM), (reg.CAP_MSI, MSI), (reg.CAP_MSIX, MSIX), (reg.CAP_VENDOR, VENDOR)]
    assert read(VENDOR + 3, 1) == 0xAA


def test_capabilities_of_who_owns_the_bus_are_no_capability_and_the_chain_goes_on() -> None:
    read = Assigned().function.config_read
    assert read(0x100, 4) == 0x0001 | 1 << 16 | 0x140 << 20
    assert read(0x140, 4) == 0x180 << 20
    assert read(0x180, 2) == 0x0003


def test_what_is_not_ours_reaches_the_device() -> None:
    one = Assigned()
    one.function.config_write(VENDOR + 4, 4, 0x12345678)
    assert one.device.config(VENDOR + 4, 4) == 0x12345678 == one.function.config_read(VENDOR + 4, 4)
    one.device.space[VENDOR + 4] = 0x99
    assert one.function.config_read(VENDOR + 4, 1) == 0x99, "a register that changes by itself"


def test_power_state_is_kept_from_the_device_its_neighbours_are_not() -> None:
    one = Assigned()
    one.function.config_write(PM + 4, 2, 0x8103)
    assert one.device.config(PM + 4, 2) == 0x8100
    assert one.function.config_read(PM + 4, 2) == 0x8103


def test_the_device_decodes_always_the_partition_when_it_wants() -> None:
    one = Assigned()
    assert one.device.config(reg.COMMAND, 2) == 3 and not one.platform.shown
    one.enable()
    assert one.device.config(reg.COMMAND, 2) == 7
    assert list(one.platform.shown.values()) == [(one.base, 0x2000, 0x7F0000000000)]
    one.function.config_write(reg.COMMAND, 2, 0)
    assert one.device.config(reg.COMMAND, 2) == 3 and not one.platform.shown


def test_a_bar_that_moves_takes_its_memory_along() -> None:
    one = Assigned()
    one.enable()
    one.function.config_write(reg.COMMAND, 2, 0)
    one.function.config_write(reg.BAR_0, 4, 0x10000000)
    one.enable()
    assert [gpa for gpa, _, _ in one.platform.shown.values()] == [0x8010000000]
    one.function.config_write(reg.BAR_0 + 4, 4, 0x7F)  # outside of the bus's window
    assert not one.platform.shown


def test_bar_sizing_gives_the_devices_size() -> None:
    one = Assigned()
    one.function.config_write(reg.BAR_0, 4, 0xFFFFFFFF)
    assert one.function.config_read(reg.BAR_0, 4) == 0xFFFFC000 | reg.BAR_MEMORY_64 | reg.BAR_PREFETCHABLE


def test_the_pages_of_table_and_pending_bits_are_not_mapped_their_neighbours_answer() -> None:
    one = Assigned(FakeDevice(bar_bytes=0x10000, table=0x5100, pba=0x5800))
    one.enable()
    assert sorted((gpa - one.base, size) for gpa, size, _ in one.platform.shown.values()) == [
        (0, 0x5000),
        (0x6000, 0xA000),
    ]
    one.set_mmio(0x5000, 4, 0xABCD)
    assert struct.unpack_from("<I", one.device.bar, 0x5000) == (0xABCD,) and one.mmio(0x5000, 4) == 0xABCD
    one.set_mmio(0x5100, 4, 0xFEE00000)
    assert one.mmio(0x5100, 4) == 0xFEE00000 and not any(one.device.bar[0x5100:0x5104]), "the table is ours"


def test_a_small_bar_is_reached_register_by_register() -> None:
    device = FakeDevice(bar_bytes=256)
    device.space[MSI + 1] = VENDOR  # no MSI-X
    one = Assigned(device)
    one.enable()
    one.set_mmio(0x10, 4, 77)
    assert one.device.bar[0x10] == 77 and one.mmio(0x10, 4) == 77 and not one.platform.shown


def unmask(one: Assigned, vector: int, data: int) -> None:
    one.set_mmio(0x2000 + 16 * vector, 8, 0xFEE00010)
    one.set_mmio(0x2000 + 16 * vector + 8, 4, data)
    one.set_mmio(0x2000 + 16 * vector + 12, 4, 0)


def test_msix_vectors_reach_the_device_when_they_are_first_unmasked() -> None:
    one = Assigned()
    one.enable()
    one.function.config_write(MSIX + 2, 2, reg.MSIX_CONTROL_ENABLE)
    assert not one.device.connected
    unmask(one, 2, 5)
    vector = one.platform.vectors[-1]
    assert one.device.connected == {(abi.IRQ_MSIX, 2): vector.fd} and not masked(vector)
    one.set_mmio(0x2000 + 16 * 2 + 12, 4, 1)
    assert masked(vector) and one.device.connected, "the eventfd remembers what comes while it is masked"
    one.function.config_write(MSIX + 2, 2, 0)
    assert not one.device.connected


def test_vectors_of_a_kernel_that_cannot_add_them_are_connected_anew() -> None:
    one = Assigned()
    one.device.can_grow = False
    one.enable()
    one.function.config_write(MSIX + 2, 2, reg.MSIX_CONTROL_ENABLE)
    for vector in (1, 3):
        unmask(one, vector, vector)
    assert sorted(one.device.connected) == [(abi.IRQ_MSIX, 1), (abi.IRQ_MSIX, 3)]


def test_interrupts_that_cannot_be_had_are_reported() -> None:
    one = Assigned()
    one.device.fails = True
    one.enable()
    one.function.config_write(MSIX + 2, 2, reg.MSIX_CONTROL_ENABLE)
    unmask(one, 0, 1)
    assert one.problems == ["its interrupts cannot be had; try again"]


def test_msi_has_one_message() -> None:
    one = Assigned()
    one.function.config_write(MSI + 2, 2, 0x71)  # asks for all eight
    assert one.function.config_read(MSI + 2, 2) == 0x81
    one.function.config_write(MSI + 2, 2, 0)
    one.function.config_write(MSI + 4, 4, 0xFEE01010)
    one.function.config_write(MSI + 12, 2, 0x31)
    one.function.config_write(MSI + 2, 2, 1)
    vector = next(vector for vector in one.platform.vectors if vector.fd >= 0)
    assert ("program", 0xFEE01010, 0x31) in vector.calls and not masked(vector)
    assert one.device.connected == {(abi.IRQ_MSI, 0): vector.fd}
    assert not any(one.device.space[MSI + 4 : MSI + 14]), "the device's own message is VFIO's matter"
    one.function.config_write(MSI + 2, 2, 0)
    assert masked(vector) and not one.device.connected


@pytest.mark.parametrize(
    ("table", "pba"), [(0x3FF8, 0), (0x2000 | 5, 0x3000), (0x2000, 0x2010), (0x2000, 0x3000 | 7)]
)
def test_an_msix_capability_that_makes_no_sense_is_left_out(table: int, pba: int) -> None:
    one = Assigned(FakeDevice(table=table, pba=pba))
    assert one.function.msix is None
    assert one.function.config_read(MSI + 1, 1) == VENDOR


def test_a_chain_that_is_a_loop_ends() -> None:
    device = FakeDevice()
    device.space[VENDOR + 1] = VENDOR
    struct.pack_into("<I", device.space, 0x180, 0x0003 | 1 << 16 | 0x100 << 20)
    Assigned(device)


def test_reset_and_close_leave_nothing() -> None:
    one = Assigned()
    one.enable()
    one.function.config_write(MSIX + 2, 2, reg.MSIX_CONTROL_ENABLE)
    unmask(one, 0, 1)
    one.function.reset()
    assert one.device.resets == 1 and not one.platform.shown and not one.device.connected
    one.function.close()
    assert one.device.closed


def with_rom(size: int) -> Assigned:
    device = FakeDevice()
    device.rom = bytes(n * 7 & 0xFF for n in range(size))
    device.regions[abi.REGION_ROM] = Region(size, 0, [])
    return Assigned(device)


def test_the_rom_has_the_devices_size_and_is_shown_while_both_switches_are_on() -> None:
    one = with_rom(0x20000)
    write, read = one.function.config_write, one.function.config_read
    assigned = read(reg.ROM_BASE, 4)
    assert assigned and not assigned & 0x1FFFF and 0xC0000000 <= assigned < 0xE0000000
    write(reg.ROM_BASE, 4, 0xFFFFF800)
    assert read(reg.ROM_BASE, 4) == 0xFFFE0000
    write(reg.ROM_BASE, 4, assigned)
    one.enable()
    assert all(gpa != assigned for gpa, _, _ in one.platform.shown.values())
    write(reg.ROM_BASE, 4, assigned | reg.ROM_ENABLE)
    assert (assigned, 0x20000, 0x7E0000000000) in one.platform.shown.values()
    one.platform.mmio.write(assigned + 4, 4, 0)  # what comes as an exit, because the memory is to read only
    write(reg.COMMAND, 2, 0)
    assert not one.platform.shown
    one.enable()
    write(reg.ROM_BASE, 4, assigned)
    assert all(gpa != assigned for gpa, _, _ in one.platform.shown.values())


def test_a_rom_of_less_than_a_page_is_read_by_exits() -> None:
    one = with_rom(2048)
    assigned = one.function.config_read(reg.ROM_BASE, 4)
    one.enable()
    one.function.config_write(reg.ROM_BASE, 4, assigned | reg.ROM_ENABLE)
    assert one.platform.mmio.read(assigned + 8, 4) == int.from_bytes(one.device.rom[8:12], "little")


@pytest.mark.parametrize("size", [0, 1024, 3000])
def test_without_a_rom_that_can_be_expressed_the_register_is_zero(size: int) -> None:
    one = with_rom(size)
    one.function.config_write(reg.ROM_BASE, 4, 0xFFFFFFFF)
    assert one.function.config_read(reg.ROM_BASE, 4) == 0


def test_table_and_pending_bits_cannot_lie_in_the_rom() -> None:
    device = FakeDevice(table=0x6, pba=0x3000)
    device.regions[abi.REGION_ROM] = Region(0x10000, 0, [])
    assert Assigned(device).function.msix is None


def test_random_accesses_raise_nothing_and_map_nothing_outside_the_window() -> None:
    chance = random.Random(20261127)
    one = Assigned()
    for _ in range(20000):
        size = chance.choice((1, 2, 4))
        offset = chance.choice((chance.randrange(0, 0x100, size), chance.randrange(0, 4096, size)))
        value = chance.choice((0, 7, 0xFFFFFFFF, chance.getrandbits(32))) & ((1 << 8 * size) - 1)
        if chance.random() < 0.3:
            value_read = one.function.config_read(offset, size)
            assert 0 <= value_read < 1 << 8 * size
        elif chance.random() < 0.6:
            one.function.config_write(offset, size, value)
        else:
            place = chance.randrange(0x2000, 0x4000, size)
            bar = one.function.bars[0]
            if bar.mapped_at is not None:
                one.platform.mmio.write(bar.mapped_at + place, size, value)
                one.platform.mmio.read(bar.mapped_at + place, size)
        for gpa, length, _ in one.platform.shown.values():
            assert MMIO[0] <= gpa and gpa + length <= MMIO[0] + MMIO[1]
        assert one.device.config(reg.COMMAND, 2) & 3 == 3


def with_pin() -> Assigned:
    device = FakeDevice()
    device.space[reg.INTERRUPT_PIN] = 2
    return Assigned(device)


def test_a_pin_has_a_line_while_no_messages_are_on() -> None:
    one = with_pin()
    ((bdf, pin, line),) = one.platform.lines
    assert (bdf, pin, one.function.interrupt_pin) == (4 << 3, 2, 2)
    assert one.device.connected == {(abi.IRQ_INTX, 0): 100} and one.device.unmask == 101
    one.enable()
    one.function.config_write(MSIX + 2, 2, reg.MSIX_CONTROL_ENABLE)
    unmask(one, 0, 1)
    assert list(one.device.connected) == [(abi.IRQ_MSIX, 0)], "one kind at a time"
    one.function.config_write(MSIX + 2, 2, 0)
    assert list(one.device.connected) == [(abi.IRQ_INTX, 0)]
    one.function.config_write(MSI + 2, 2, 1)
    assert list(one.device.connected) == [(abi.IRQ_MSI, 0)]
    one.function.reset()
    assert list(one.device.connected) == [(abi.IRQ_INTX, 0)]
    one.function.close()
    assert line.closed and not one.device.connected


def test_without_a_pin_there_is_no_line() -> None:
    one = Assigned()
    assert not one.platform.lines and one.function.interrupt_pin == 0
