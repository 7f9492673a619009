# SPDX-License-Identifier: Apache-2.0
"""The board and the devices in its slots, against a guest that touches everything in every way."""

from __future__ import annotations

import marshal
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from rootvisor.boot import memory_map
from rootvisor.boot.memory_map import MemoryMap
from rootvisor.daemons import storage
from rootvisor.mshv import Memory
from rootvisor.vmm.board import Board
from rootvisor.vmm.controller import MachineError
from rootvisor.vmm.device_makers import balloon_of, plug_configured, plug_disk, plug_net
from rootvisor.vmm.devices import Devices
from rootvisor.vmm.guest_ram import GuestRam
from tests.unit.virtio.qcow2 import write_qcow2
from tests.unit.vmm.fake_partition import FakePartition

Document = dict[str, Any]
CASES = int(os.environ.get("ROOTVISOR_FUZZ", "4000"))


class Region:
    def __init__(self, partition: Partition, gpa: int) -> None:
        self.partition, self.gpa = partition, gpa

    def unmap(self) -> None:
        del self.partition.mapped[self.gpa]


class Partition(FakePartition):
    """Memory of it, too."""

    def __init__(self) -> None:
        super().__init__()
        self.mapped: dict[int, int] = {}

    def map(self, gpa: int, memory: Memory, *, writable: bool = True) -> Region:
        assert gpa not in self.mapped and not writable
        self.mapped[gpa] = memory.size
        return Region(self, gpa)


class Guest:
    """A board with devices and what they did."""

    def __init__(self, config: Document | None = None, *, serial: bool = True) -> None:
        self.partition = Partition()
        layout = MemoryMap(64 << 20, 40)
        self.ram = GuestRam(layout)
        self.ended: list[str] = []
        self.failures: list[tuple[str, str]] = []
        self.output = os.memfd_create("serial")
        self.board = Board(
            self.partition, layout, self.ram.memory, lambda how, _detail: self.ended.append(how),  # type: ignore[arg-type]
            self.eject, serial, self.output,
        )  # fmt: skip
        self.devices = Devices(self.board, lambda name, reason: self.failures.append((name, reason)))
        if config is not None:
            plug_configured(self.devices, config, NoConsole(), None, self.ram)  # type: ignore[arg-type]
        self.board.ecam.follow()
        self.board.pci.assign_bars()

    def eject(self, number: int) -> None:
        self.devices.unplug_slot(number)

    def bars(self) -> list[tuple[int, int]]:
        """Address and size of every memory BAR that a function has now."""
        return [(base, length) for base, length, _ in self.board.platform.mmio._table[1]]

    def close(self) -> None:
        self.devices.close()
        self.board.close()
        self.board.free()
        self.ram.close()
        os.close(self.output)
        assert self.partition.irqfds == [] and self.partition.doorbells == []


class NoConsole:
    present = False


def configuration(folder: Path) -> Document:
    image = folder / "disk"
    image.write_bytes(bytes(1 << 20))
    return {
        "disks": [disk(image)],
        "balloon": {"id": "__balloon", "size": 0, "deflate_on_oom": False, "free_page_reporting": False},
        "rng": {"id": "__rng", "src": "/dev/urandom"},
    }


def disk(path: Path, name: str = "_disk0", more: Document | None = None) -> Document:
    return {
        "id": name, "path": str(path), "readonly": False, "vhost_user": False, "image_type": "Raw", "direct": False,
        "num_queues": 1, "serial": "s", "backing_files": False,
    } | (more or {})  # fmt: skip


def empty(path: Path) -> Path:
    """An image of zeros. Each device needs one of its own: images are locked."""
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    one = Guest(configuration(tmp_path))
    yield one
    one.close()


def test_devices_lie_in_slots_in_the_order_of_the_configuration(guest: Guest) -> None:
    tree = guest.devices.tree()
    assert list(tree) == ["_disk0", "__balloon", "__rng"]
    assert [tree[name]["pci_bdf"] for name in tree] == [f"0000:00:{slot:02x}.0" for slot in (1, 2, 3)]


def test_configuration_space_is_memory_that_the_guest_reads_without_an_exit(guest: Guest) -> None:
    assert guest.partition.mapped == {memory_map.ECAM: guest.board.pci.ecam_bytes}
    vendor = guest.board.platform.mmio.read(memory_map.ECAM + (1 << 15), 2)
    assert vendor == 0x1AF4


def test_counters_are_numbers_by_device(guest: Guest) -> None:
    counters = guest.devices.counters()
    assert set(counters) == {"_disk0", "__balloon", "__rng"}
    assert all(isinstance(value, int) for one in counters.values() for value in one.values())


def test_state_is_plain_data_and_comes_back(guest: Guest, tmp_path: Path) -> None:
    guest.devices.pause()
    board, devices = marshal.loads(marshal.dumps((guest.board.save(), guest.devices.save())))
    guest.devices.resume()
    (tmp_path / "other").mkdir()
    other = Guest(configuration(tmp_path / "other"))
    other.devices.pause()
    other.board.restore(board)
    other.devices.restore(devices)
    assert other.devices.save() == devices and other.board.save() == board
    other.devices.resume()
    other.close()


def test_state_of_other_devices_is_refused(guest: Guest, tmp_path: Path) -> None:
    guest.devices.pause()
    saved = guest.devices.save()
    other = Guest({**configuration(tmp_path), "disks": []})
    other.devices.pause()
    with pytest.raises(ValueError, match="3 devices"):
        other.devices.restore(saved)
    other.devices.resume()
    guest.devices.resume()
    other.close()


def test_disk_comes_and_goes(guest: Guest, tmp_path: Path) -> None:
    before = guest.bars()
    for _ in range(40):
        one = plug_disk(guest.devices, disk(empty(tmp_path / "more"), "more"))
        guest.board.ecam.follow()
        guest.board.hotplug.inserted(one.bdf >> 3)
        assert guest.board.platform.ports.read(memory_map.PCI_HOTPLUG, 4) == 1 << (one.bdf >> 3)
        guest.board.hotplug.ask_to_eject(one.bdf >> 3)
        guest.board.platform.ports.write(memory_map.PCI_HOTPLUG + 8, 4, 1 << (one.bdf >> 3))
        assert "more" not in guest.devices.plugged and guest.bars() == before


def test_name_of_a_device_that_the_guest_has_not_let_go_is_refused(guest: Guest, tmp_path: Path) -> None:
    one = plug_disk(guest.devices, disk(empty(tmp_path / "more"), "more"))
    guest.board.hotplug.ask_to_eject(one.bdf >> 3)
    count = len(os.listdir("/proc/self/fd"))
    with pytest.raises(MachineError, match="more: the guest has not let go"):
        plug_disk(guest.devices, disk(empty(tmp_path / "other"), "more"))
    assert guest.devices.plugged["more"] is one
    assert len(os.listdir("/proc/self/fd")) <= count  # less: a worker of an earlier test has ended meanwhile
    guest.board.platform.ports.write(memory_map.PCI_HOTPLUG + 8, 4, 1 << (one.bdf >> 3))
    plug_disk(guest.devices, disk(empty(tmp_path / "more"), "more"))


def test_slot_that_two_processors_eject_is_emptied_once(guest: Guest, tmp_path: Path) -> None:
    """The second one comes while the first one closes the device."""
    one = plug_disk(guest.devices, disk(empty(tmp_path / "more"), "more"))
    seen: list[object] = []

    def release() -> None:
        seen.append("more" in guest.devices.plugged)
        guest.board.platform.ports.write(memory_map.PCI_HOTPLUG + 8, 4, 1 << (one.bdf >> 3))

    one.release = release
    guest.board.platform.ports.write(memory_map.PCI_HOTPLUG + 8, 4, 1 << (one.bdf >> 3))
    assert seen == [True] and "more" not in guest.devices.plugged


def test_devices_are_counted_while_the_guest_ejects_them(guest: Guest, tmp_path: Path) -> None:
    one = plug_disk(guest.devices, disk(empty(tmp_path / "more"), "more"))

    class Ejected:
        """Its slot is ejected, by the processor's thread, in the middle of the count."""

        @property
        def counters(self) -> list[object]:
            guest.board.platform.ports.write(memory_map.PCI_HOTPLUG + 8, 4, 2)
            return []

    device, one.device = one.device, Ejected()  # type: ignore[assignment]
    assert set(guest.devices.counters()) == {"_disk0", "__balloon", "__rng", "more"}
    assert set(guest.devices.tree()) == {"__balloon", "__rng", "more"}
    one.device = device


def test_more_devices_than_slots_give_a_line(guest: Guest, tmp_path: Path) -> None:
    count = len(os.listdir("/proc/self/fd"))
    with pytest.raises(MachineError, match="disk[34][0-9]: no free place"):
        for number in range(10, 50):
            plug_disk(guest.devices, disk(empty(tmp_path / f"{number}"), f"disk{number}"))
    for name in [name for name in guest.devices.plugged if name.startswith("disk")]:
        guest.devices.unplug(name)
    assert len(os.listdir("/proc/self/fd")) <= count  # less: a worker of an earlier test has ended meanwhile


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"path": "/nowhere/disk"}, "disk"),
        ({"path": "/"}, "disk"),
        ({"vhost_user": True, "vhost_socket": "/nowhere/socket"}, "does the back end run"),
        ({"num_queues": 2}, "serial number"),
    ],
)
def test_disk_that_cannot_be_gives_one_line(
    guest: Guest, tmp_path: Path, more: Document, reason: str
) -> None:
    with pytest.raises(MachineError, match=reason) as raised:
        plug_disk(guest.devices, disk(tmp_path / "disk", "disk", more))
    assert "\n" not in str(raised.value) and "disk" not in guest.devices.plugged


@pytest.mark.parametrize("kind", ["Raw", "Qcow2"])
def test_image_that_another_guest_writes_is_refused_until_it_lets_go(
    guest: Guest, tmp_path: Path, kind: str
) -> None:
    if kind == "Qcow2" and not storage.is_installed():
        pytest.skip("qemu-storage-daemon is not installed (qemu-system-common)")
    path = empty(tmp_path / "image")
    if kind == "Qcow2":
        write_qcow2(path, bytes(1 << 20))
    config = disk(path, "one", {"image_type": kind})
    if kind == "Qcow2":
        del config["serial"]
    plug_disk(guest.devices, config)
    for readonly in (False, True):
        with pytest.raises(
            MachineError, match=r"^two: disk image .*image is .* by another machine"
        ) as raised:
            plug_disk(guest.devices, config | {"id": "two", "readonly": readonly})
        assert "\n" not in str(raised.value)
    guest.devices.unplug("one")
    for name in ("two", "three"):
        plug_disk(guest.devices, config | {"id": name, "readonly": True})


def test_image_of_unknown_type_that_looks_like_qcow2_is_refused(guest: Guest, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"QFI\xfb" + bytes(600))
    with pytest.raises(MachineError, match="image_type=qcow2"):
        plug_disk(guest.devices, disk(path, "disk", {"image_type": "Unknown"}))


def test_network_on_a_tap_that_is_not_there_gives_one_line(guest: Guest) -> None:
    with pytest.raises(MachineError) as raised:
        plug_net(guest.devices, {"id": "net", "vhost_user": True, "vhost_socket": "/nowhere"})
    assert "\n" not in str(raised.value)


def test_balloon_is_found_and_missed(guest: Guest) -> None:
    assert balloon_of(guest.devices).actual == 0
    guest.devices.unplug("__balloon")
    with pytest.raises(MachineError, match="no balloon"):
        balloon_of(guest.devices)


@pytest.mark.parametrize("port", [0xCF9, 0x64])
def test_reset_ports_reset(guest: Guest, port: int) -> None:
    guest.board.platform.ports.write(port, 1, 0x06 if port == 0xCF9 else 0xFE)
    assert guest.ended == ["reset"]


def test_serial_port_writes_to_its_descriptor(guest: Guest) -> None:
    for byte in b"hello":
        guest.board.platform.ports.write(0x3F8, 1, byte)
    assert os.pread(guest.output, 10, 0) == b"hello"


def test_board_without_a_serial_port_has_none(tmp_path: Path) -> None:
    one = Guest(configuration(tmp_path), serial=False)
    assert one.board.serial is None and one.board.platform.ports.read(0x3FD, 1) == 0xFF
    assert one.board.acpi(4).serial is None and list(one.board.acpi(4).apic_ids) == [0, 1, 2, 3]
    one.close()


# --- a guest that means harm ----------------------------------------------------------------------------------------
SIZES = (1, 2, 4, 8)


def test_every_offset_of_every_bar_answers_at_every_width(guest: Guest) -> None:
    """Reads, then writes of all zeros, all ones and a pattern; also where a range ends in the middle of the access."""
    mmio = guest.board.platform.mmio
    for base, length in guest.bars():
        step = 1 if length <= 0x1000 else 0x11 if length <= 0x1_0000 else 0x1003
        for offset in [*range(0, length, step), *range(max(0, length - 9), length + 1)]:
            for size in SIZES:
                assert 0 <= mmio.read(base + offset, size) < 1 << 8 * size
                for value in (0, (1 << 8 * size) - 1):
                    if base != memory_map.ECAM:
                        mmio.write(base + offset, size, value)
    check_alive(guest)


def test_every_port_answers_at_every_width(guest: Guest) -> None:
    ports = guest.board.platform.ports
    for port in range(0x10000):
        for size in (1, 2, 4):
            assert 0 <= ports.read(port, size) < 1 << 8 * size
            for value in (0, (1 << 8 * size) - 1):
                ports.write(port, size, value)


def test_any_configuration_is_survived(guest: Guest) -> None:
    """BARs anywhere and over each other, decoding on and off, MSI-X on and off, capabilities scribbled over."""
    random = Random(23)
    mmio = guest.board.platform.mmio
    functions = [one.bdf for one in guest.devices.plugged.values()] + [0, 0xF8]
    for _ in range(CASES):
        size = random.choice((1, 2, 4))
        register = random.choice(
            (4, 6, 0x10, 0x14, 0x18, 0x1C, 0x20, 0x24, 0x30, 0x34, 0x3C, random.randrange(4096))
        )
        address = memory_map.ECAM + (random.choice(functions) << 12) + register
        value = random.choice(
            (0, (1 << 8 * size) - 1, random.getrandbits(8 * size), 0xC000_0000 & (1 << 8 * size) - 1)
        )
        mmio.write(address, size, value)
        assert 0 <= mmio.read(address, size) < 1 << 8 * size
        if random.random() < 0.3:
            bars = guest.bars()
            base, length = random.choice(bars)
            where, width = base + random.randrange(length), random.choice(SIZES)
            if base != memory_map.ECAM:
                mmio.write(where, width, random.getrandbits(8 * width))
            mmio.read(where, width)
    assert guest.partition.mapped in ({}, {memory_map.ECAM: guest.board.pci.ecam_bytes})


def test_bad_msi_x_programming_raises_no_interrupt_and_leaks_none(guest: Guest) -> None:
    random = Random(29)
    mmio = guest.board.platform.mmio
    for bdf in (one.bdf for one in guest.devices.plugged.values()):
        config = memory_map.ECAM + (bdf << 12)
        mmio.write(config + 4, 2, 6)
        capability = mmio.read(config + 0x34, 1)
        while capability and mmio.read(config + capability, 1) != 0x11:
            capability = mmio.read(config + capability + 1, 1)
        assert capability, "the function has no MSI-X"
        where = mmio.read(config + capability + 4, 4)
        bar = mmio.read(config + 0x10 + 4 * (where & 7), 4) & ~0xF
        if mmio.read(config + 0x10 + 4 * (where & 7), 4) & 4:
            bar |= mmio.read(config + 0x14 + 4 * (where & 7), 4) << 32
        table = bar + (where & ~7)
        count = (mmio.read(config + capability + 2, 2) & 0x7FF) + 1
        assert any(base <= table < base + length for base, length in guest.bars())
        for _ in range(CASES // 4):
            mmio.write(config + capability + 2, 2, random.choice((0, 0x8000, 0xC000, random.getrandbits(16))))
            entry = table + 16 * random.randrange(count)
            message = random.choice(
                (0xFEE0_0000, random.getrandbits(64), 0xFEE0_0000 | random.getrandbits(20))
            )
            fields = struct.pack(
                "<QII", message, random.getrandbits(32), random.choice((0, 1, random.getrandbits(32)))
            )
            for at in range(0, 16, 4):
                mmio.write(entry + at, 4, int.from_bytes(fields[at : at + 4], "little"))
            mmio.write(entry + random.randrange(16), random.choice(SIZES), random.getrandbits(8))
            numbers = [number for _, number in guest.partition.irqfds]
            assert len(set(numbers)) == len(numbers)
            for _number, address, _data in guest.partition.routes:
                assert address >> 20 == 0xFEE, "a message that is none for local APICs"
        mmio.write(config + capability + 2, 2, 0)


def check_alive(guest: Guest) -> None:
    """The devices still stop and save."""
    guest.devices.pause()
    marshal.dumps(guest.devices.save())
    guest.devices.resume()
