# SPDX-License-Identifier: Apache-2.0
"""ACPI tables of a computer of ours, whose board is :mod:`.memory_map`'s: RSDP, XSDT, FADT, FACS, DSDT, MADT, MCFG.

Sources: ACPI 6.5 chapter 5 (tables) and 6 (device configuration), PCI Firmware Specification 3.3 section 4
(MCFG, host bridge). What Linux needs as the root partition is the reason for what is left out: no VGA, no
8042, no HPET, no DMAR (which would take interrupt remapping away from the Hyper-V code), not
hardware-reduced.
"""

from __future__ import annotations

import struct

from . import acpi_hotplug, aml, memory_map

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Final

RSDP_SIZE: Final = 36
FACS_SIZE: Final = 64
FADT_SIZE: Final = 276

FADT_WBINVD: Final = 1 << 0
FADT_PROC_C1: Final = 1 << 2
FADT_PWR_BUTTON: Final = 1 << 4
"""Set = the power button is a device in the DSDT; clear = it is the fixed one in the PM1 registers."""
FADT_SLP_BUTTON: Final = 1 << 5
FADT_FIX_RTC: Final = 1 << 6
"""Set = the RTC's wake status is not in the PM1 registers."""
FADT_TMR_VAL_EXT: Final = 1 << 8
FADT_RESET_REG_SUP: Final = 1 << 10

BOOT_ARCH_LEGACY_DEVICES: Final = 1 << 0
BOOT_ARCH_NO_VGA: Final = 1 << 2

_OEM_ID = b"ROOTVR"
_OEM_TABLE_ID = b"ROOTVISR"
_OEM_REVISION = 1
_CREATOR_ID = b"RTVR"
_CREATOR_REVISION = 1
_HEADER_SIZE = 36
_ALIGN = 64  # FACS must be 64-byte aligned; the others do not mind
_MAX_LAPIC_ID = 254  # 255 is the broadcast id of an xAPIC
_LAPIC_GPA = 0xFEE00000
_SPACE_IO = 1
_BYTE, _WORD, _DWORD = 1, 2, 3  # access size of a generic address
_GPE_BYTES = 4  # status and enable bits of sixteen events
_ACTIVE_HIGH_LEVEL = 0x000D  # MPS INTI flags
_S5_TYPE = 5  # SLP_TYP that powers off
_RTC_PORT = 0x70
_RTC_CENTURY = 0x32  # byte in CMOS


class AcpiConfig:
    """What the computers differ in. Addresses are GPAs, ports I/O ports, ranges (base, bytes).

    ``apic_ids``: local APICs, the boot processor's first. ``reset``: (port, value) that resets the machine, or None.
    ``ecam``: PCI configuration space at (GPA, number of buses), or None. ``io_window``, ``mmio32``, ``mmio64``: what
    the host bridge decodes, None for none. ``serial``: (port, ISA IRQ) of a 16550, or None. ``pic``: there is a pair
    of 8259s as well. ``hotplug``: functions come and go on bus 0 (:mod:`.acpi_hotplug`). ``interrupt_pins``: (device
    on bus 0, pin from 1, GSI) of functions that interrupt by a level-triggered, active-low line.
    """

    __slots__ = (
        "apic_ids",
        "ecam",
        "hotplug",
        "interrupt_pins",
        "io_window",
        "mmio32",
        "mmio64",
        "pic",
        "reset",
        "serial",
    )

    def __init__(
        self,
        *,
        apic_ids: Sequence[int],
        reset: tuple[int, int] | None = None,
        ecam: tuple[int, int] | None = None,
        io_window: tuple[int, int] | None = None,
        mmio32: tuple[int, int] | None = None,
        mmio64: tuple[int, int] | None = None,
        serial: tuple[int, int] | None = memory_map.COM1,
        pic: bool = True,
        hotplug: bool = False,
        interrupt_pins: Sequence[tuple[int, int, int]] = (),
    ) -> None:
        self.apic_ids = tuple(apic_ids)
        self.reset = reset
        self.ecam = ecam
        self.io_window = io_window
        self.mmio32 = mmio32
        self.mmio64 = mmio64
        self.serial = serial
        self.pic = pic
        self.hotplug = hotplug
        self.interrupt_pins = tuple(interrupt_pins)


def build_acpi(config: AcpiConfig, gpa: int) -> bytes:
    """All tables as one block for the 64-byte aligned ``gpa``; the RSDP is its first byte.

    The block belongs in memory that the e820 map calls reserved, ACPI or NVS.
    """
    if gpa % _ALIGN:
        raise ValueError(f"ACPI tables at {gpa:#x} are not {_ALIGN}-byte aligned")
    block = bytearray(_pad(RSDP_SIZE))

    def place(table: bytes) -> int:
        address = gpa + len(block)
        block.extend(table)
        block.extend(bytes(-len(block) % _ALIGN))
        return address

    facs_gpa = place(_facs())
    dsdt_gpa = place(_table(b"DSDT", 2, _dsdt(config)))
    tables = [place(_fadt(config, facs_gpa, dsdt_gpa)), place(_madt(config))]
    if config.ecam is not None:
        tables.append(place(_mcfg(config.ecam)))
    xsdt_gpa = place(_table(b"XSDT", 1, struct.pack(f"<{len(tables)}Q", *tables)))
    block[:RSDP_SIZE] = _rsdp(xsdt_gpa)
    return bytes(block)


def _pad(size: int) -> int:
    return size + -size % _ALIGN


def _checksum(content: bytes | bytearray) -> int:
    return -sum(content) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    header = struct.pack(
        "<4sIBB6s8sI4sI",
        signature,
        _HEADER_SIZE + len(body),
        revision,
        0,
        _OEM_ID,
        _OEM_TABLE_ID,
        _OEM_REVISION,
        _CREATOR_ID,
        _CREATOR_REVISION,
    )
    checksum = _checksum(header + body)
    return header[:9] + bytes((checksum,)) + header[10:] + body


def _rsdp(xsdt_gpa: int) -> bytes:
    first = bytearray(struct.pack("<8sB6sBI", b"RSD PTR ", 0, _OEM_ID, 2, 0))
    first[8] = _checksum(first)
    whole = bytearray(first + struct.pack("<IQB3x", RSDP_SIZE, xsdt_gpa, 0))
    whole[32] = _checksum(whole)
    return bytes(whole)


def _facs() -> bytes:
    return struct.pack("<4sIIIIIQB", b"FACS", FACS_SIZE, 0, 0, 0, 0, 0, 2).ljust(FACS_SIZE, b"\0")


def _port(port: int, bits: int, access: int) -> bytes:
    """Generic address structure of an I/O register (5.2.3.2)."""
    return struct.pack("<BBBBQ", _SPACE_IO, bits, 0, access, port)


def _fadt(config: AcpiConfig, facs_gpa: int, dsdt_gpa: int) -> bytes:
    flags = FADT_WBINVD | FADT_PROC_C1 | FADT_SLP_BUTTON | FADT_FIX_RTC | FADT_TMR_VAL_EXT
    reset_register, reset_value = bytes(12), 0
    if config.reset is not None:
        port, reset_value = config.reset
        reset_register = _port(port, 8, _BYTE)
        flags |= FADT_RESET_REG_SUP
    body = bytearray(FADT_SIZE - _HEADER_SIZE)

    def put(layout: str, offset: int, *values: int) -> None:
        struct.pack_into("<" + layout, body, offset - _HEADER_SIZE, *values)

    def put_address(offset: int, address: bytes) -> None:
        body[offset - _HEADER_SIZE : offset - _HEADER_SIZE + 12] = address

    put("II", 36, facs_gpa & 0xFFFFFFFF, dsdt_gpa & 0xFFFFFFFF)
    put("BBH", 44, 0, 4, memory_map.SCI_GSI)  # preferred profile 4: enterprise server
    # No SMI command port (offset 48): the hardware is in ACPI mode from the start.
    put("I", 56, memory_map.PM1_EVENT)
    put("I", 64, memory_map.PM1_CONTROL)
    put("I", 76, memory_map.PM_TIMER)
    if config.hotplug:
        put("I", 80, memory_map.GPE_BLOCK)
        put("B", 92, _GPE_BYTES)
        put_address(220, _port(memory_map.GPE_BLOCK, 8 * _GPE_BYTES, _BYTE))
    put("BBxB", 88, 4, 2, 4)  # lengths of the PM1 event and control blocks, and of the timer
    put("HH", 96, 0xFFFF, 0xFFFF)  # worst C2 and C3 latencies: neither exists
    put("B", 108, _RTC_CENTURY)
    put("HBI", 109, BOOT_ARCH_LEGACY_DEVICES | BOOT_ARCH_NO_VGA, 0, flags)
    put_address(116, reset_register)
    put("BHB", 128, reset_value, 0, 5)  # minor version: 6.5
    put("QQ", 132, facs_gpa if facs_gpa >> 32 else 0, dsdt_gpa)
    put_address(148, _port(memory_map.PM1_EVENT, 32, _WORD))
    put_address(172, _port(memory_map.PM1_CONTROL, 16, _WORD))
    put_address(208, _port(memory_map.PM_TIMER, 32, _DWORD))
    return _table(b"FACP", 6, bytes(body))


def _madt(config: AcpiConfig) -> bytes:
    entries = [struct.pack("<II", _LAPIC_GPA, config.pic)]  # flag 1: there is an 8259 pair as well
    for uid, apic_id in enumerate(config.apic_ids):
        if apic_id <= _MAX_LAPIC_ID:
            entries.append(struct.pack("<BBBBI", 0, 8, uid & 0xFF, apic_id, 1))
        else:
            entries.append(struct.pack("<BBHIII", 9, 16, 0, apic_id, 1, uid))
    entries.append(struct.pack("<BBBBII", 1, 12, memory_map.IOAPIC_ID, 0, memory_map.IOAPIC, 0))
    # The timer interrupt of the PC (ISA 0) reaches pin 2; the SCI is a level-triggered, active-high line.
    entries.append(struct.pack("<BBBBIH", 2, 10, 0, 0, 2, 0))
    sci = memory_map.SCI_GSI
    entries.append(struct.pack("<BBBBIH", 2, 10, 0, sci, sci, _ACTIVE_HIGH_LEVEL))
    entries.append(struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1))  # NMI on LINT1 of every processor
    return _table(b"APIC", 5, b"".join(entries))


def _mcfg(ecam: tuple[int, int]) -> bytes:
    base, buses = ecam
    return _table(b"MCFG", 1, struct.pack("<8xQHBB4x", base, 0, 0, buses - 1))


def _dsdt(config: AcpiConfig) -> bytes:
    sleep_type = aml.integer(_S5_TYPE)
    sleep = aml.package(sleep_type, sleep_type, aml.integer(0), aml.integer(0))
    devices = [_host_bridge(config), _board(config)]
    if config.serial is not None:
        port, line = config.serial
        devices.append(
            aml.device(
                "COM1",
                aml.name("_HID", aml.eisa_id("PNP0501")),
                aml.name("_UID", aml.integer(1)),
                aml.name("_CRS", aml.resource_template(aml.io(port, 8), aml.irq(line))),
            )
        )
    devices.append(
        aml.device(
            "RTC_",
            aml.name("_HID", aml.eisa_id("PNP0B00")),
            aml.name("_CRS", aml.resource_template(aml.io(_RTC_PORT, 2))),
        )
    )
    events = acpi_hotplug.event() if config.hotplug else b""
    return aml.name("\\_S5_", sleep) + aml.scope("\\_SB_", *devices) + events


def _host_bridge(config: AcpiConfig) -> bytes:
    buses = config.ecam[1] if config.ecam is not None else 256
    windows = [aml.bus_range(0, buses - 1), aml.io(0xCF8, 8)]
    if config.io_window is not None:
        windows.append(aml.io_window(*config.io_window))
    if config.mmio32 is not None:
        windows.append(aml.memory32_window(*config.mmio32))
    if config.mmio64 is not None:
        windows.append(aml.memory64_window(*config.mmio64))
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A08")),
        aml.name("_CID", aml.eisa_id("PNP0A03")),
        aml.name("_SEG", aml.integer(0)),
        aml.name("_BBN", aml.integer(0)),
        aml.name("_UID", aml.integer(0)),
        aml.name("_CRS", aml.resource_template(*windows)),
        # Everything the operating system asks for (hot plug, error reporting, ...) is its own: no firmware
        # competes.
        aml.method("_OSC", 4, aml.RETURN_ARG3),
        acpi_hotplug.slots(memory_map.PCI_HOTPLUG) if config.hotplug else b"",
        _interrupt_routing(config.interrupt_pins),
    )


def _interrupt_routing(pins: Sequence[tuple[int, int, int]]) -> bytes:
    """_PRT (ACPI 6.4, 6.2.13): all functions of a device, its pin from 0, no link device, the GSI."""
    entries = [
        aml.package(*(aml.integer(value) for value in (device << 16 | 0xFFFF, pin - 1, 0, gsi)))
        for device, pin, gsi in pins
    ]
    return aml.name("_PRT", aml.package(*entries)) if entries else b""


def _board(config: AcpiConfig) -> bytes:
    """Motherboard resources: Linux trusts ECAM only where a device like this (or e820) reserves it."""
    ports = [(memory_map.PM1_EVENT, 4), (memory_map.PM1_CONTROL, 2), (memory_map.PM_TIMER, 4)]
    if config.reset is not None:
        ports.append((config.reset[0], 1))
    if config.hotplug:
        ports += [
            (memory_map.GPE_BLOCK, _GPE_BYTES), (memory_map.PCI_HOTPLUG, acpi_hotplug.REGISTER_BYTES),
        ]  # fmt: skip
    items = [aml.io(port, length) for port, length in ports]
    if config.ecam is not None:
        items.append(aml.memory32_fixed(config.ecam[0], config.ecam[1] << 20))
    return aml.device(
        "MBRD",
        aml.name("_HID", aml.eisa_id("PNP0C02")),
        aml.name("_UID", aml.integer(1)),
        aml.name("_CRS", aml.resource_template(*items)),
    )
