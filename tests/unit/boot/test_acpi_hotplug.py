# SPDX-License-Identifier: Apache-2.0
"""The AML of slots that come and go, as ACPICA's disassembler and compiler read it."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from rootvisor.boot import acpi_hotplug, memory_map
from rootvisor.boot.acpi import AcpiConfig, build_acpi

GPA = 0xE0000
GPE_PORT, SLOT_PORT = memory_map.GPE_BLOCK, memory_map.PCI_HOTPLUG
CONFIG = AcpiConfig(
    apic_ids=[0],
    ecam=(0xB0000000, 1),
    io_window=(0x1000, 0xF000),
    mmio32=(0xC0000000, 0x3EC00000),
    hotplug=True,
)


def table(signature: bytes) -> bytes:
    block = build_acpi(CONFIG, GPA)
    if signature == b"DSDT":
        at = struct.unpack_from("<I", table(b"FACP"), 40)[0] - GPA
    else:
        (xsdt,) = struct.unpack_from("<Q", block, 24)
        (length,) = struct.unpack_from("<I", block, xsdt - GPA + 4)
        entries = struct.iter_unpack("<Q", block[xsdt - GPA + 36 : xsdt - GPA + length])
        at = next(gpa - GPA for (gpa,) in entries if block[gpa - GPA : gpa - GPA + 4] == signature)
    (length,) = struct.unpack_from("<I", block, at + 4)
    return block[at : at + length]


def test_fadt_has_the_block_of_events() -> None:
    fadt = table(b"FACP")
    assert struct.unpack_from("<I", fadt, 80) == (GPE_PORT,)  # GPE0_BLK
    assert fadt[92] == 4  # GPE0_BLK_LEN
    assert struct.unpack_from("<BBBBQ", fadt, 220) == (1, 32, 0, fadt[223], GPE_PORT)  # X_GPE0_BLK


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The DSDT's source, which the compiler takes without a word."""
    iasl = shutil.which("iasl")
    if iasl is None:
        pytest.skip("there is no iasl; apt-get install acpica-tools")
    folder: Path = tmp_path_factory.mktemp("aml")
    (folder / "dsdt.aml").write_bytes(table(b"DSDT"))
    subprocess.run([iasl, "-d", "dsdt.aml"], cwd=folder, check=True, capture_output=True, timeout=60)
    done = subprocess.run(
        [iasl, "-p", "again", "dsdt.dsl"], cwd=folder, check=True, capture_output=True, text=True, timeout=60
    )
    assert "0 Errors, 0 Warnings" in done.stdout, done.stdout
    return (folder / "dsdt.dsl").read_text()


def test_every_slot_but_the_first_has_a_device_that_can_be_ejected(source: str) -> None:
    devices = re.findall(r"Device \(S([0-9A-F]{2})\)", source)
    assert [int(number, 16) for number in devices] == list(range(acpi_hotplug.FIRST_SLOT, acpi_hotplug.SLOTS))
    for number in range(1, 32):
        body = source[source.index(f"Device (S{number:02X})") :].split("Device (", 2)[1]
        (address,) = re.findall(r"Name \(_ADR, (\w+)\)", body)
        assert int(address, 0) == number << 16
        (ejects,) = re.findall(r"PEJT = (\w+)", body)
        assert int({"One": "1"}.get(ejects, ejects), 0) == 1 << number


def test_registers_lie_where_the_chip_has_them(source: str) -> None:
    assert re.search(rf"OperationRegion \(PHPR, SystemIO, 0x0?{SLOT_PORT:X}, 0x0C\)", source)
    fields = source[source.index("Field (PHPR") :].split("}")[0]
    assert "DWordAcc" in fields
    assert re.findall(r"(\w{4}),\s+32", fields) == ["PINS", "PEJQ", "PEJT"]


def test_event_reads_each_register_once_and_notifies_for_each_bit(source: str) -> None:
    method = source[source.index("Method (PCNT") :]
    assert method.count("= PINS") == 1 and method.count("= PEJQ") == 1
    told = re.findall(r"If \(\(Local([01]) & (\w+)\)\)\s+\{\s+Notify \(S(\w\w), (\w+)\)", method)
    assert len(told) == 2 * 31
    for local, bit, slot, kind in told:
        assert int({"One": "1"}.get(bit, bit), 0) == 1 << int(slot, 16)
        assert int({"One": "1"}.get(kind, kind), 0) == (1 if local == "0" else 3)
    assert re.search(r"Scope \(\\?_GPE\)\s+\{\s+Method \(_E01", source)
