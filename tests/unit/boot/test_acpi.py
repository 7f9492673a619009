# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from rootvisor.boot.acpi import AcpiConfig, build_acpi

GPA = 0xE0000
FULL = AcpiConfig(
    apic_ids=[0, 1, 2, 300],
    reset=(0xCF9, 0x06),
    ecam=(0xB0000000, 256),
    io_window=(0x1000, 0xF000),
    mmio32=(0xC0000000, 0x3EC00000),
    mmio64=(1 << 38, 1 << 36),
    interrupt_pins=[(4, 1, 20), (31, 4, 18)],
)
SMALL = AcpiConfig(apic_ids=[0], serial=None)


def tables(config: AcpiConfig) -> dict[str, bytes]:
    """Every table reachable from the RSDP, by signature, each with a checked checksum."""
    block = build_acpi(config, GPA)

    def at(gpa: int) -> bytes:
        start = gpa - GPA
        (length,) = struct.unpack_from("<I", block, start + 4)
        table = block[start : start + length]
        if table[:4] != b"FACS":
            assert sum(table) & 0xFF == 0
        return table

    assert block[:8] == b"RSD PTR "
    assert sum(block[:20]) & 0xFF == 0
    assert sum(block[:36]) & 0xFF == 0
    (xsdt_gpa,) = struct.unpack_from("<Q", block, 24)
    xsdt = at(xsdt_gpa)
    found = {"XSDT": xsdt}
    for (gpa,) in struct.iter_unpack("<Q", xsdt[36:]):
        table = at(gpa)
        found[table[:4].decode()] = table
    facs_gpa, dsdt_gpa = struct.unpack_from("<II", found["FACP"], 36)
    assert facs_gpa % 64 == 0
    assert struct.unpack_from("<Q", found["FACP"], 140) == (dsdt_gpa,)
    found["FACS"], found["DSDT"] = at(facs_gpa), at(dsdt_gpa)
    return found


def test_every_table_is_reachable() -> None:
    assert set(tables(FULL)) == {"XSDT", "FACP", "APIC", "MCFG", "FACS", "DSDT"}
    assert set(tables(SMALL)) == {"XSDT", "FACP", "APIC", "FACS", "DSDT"}


def test_madt_lists_boot_processor_first_and_uses_x2apic_entries_only_when_needed() -> None:
    madt = tables(FULL)["APIC"]
    position, entries = 44, []
    while position < len(madt):
        entries.append(madt[position : position + madt[position + 1]])
        position += madt[position + 1]
    assert [entry[3] for entry in entries if entry[0] == 0] == [0, 1, 2]
    assert [struct.unpack_from("<I", entry, 4)[0] for entry in entries if entry[0] == 9] == [300]
    overrides = [struct.unpack_from("<BBIH", entry, 2) for entry in entries if entry[0] == 2]
    assert overrides == [(0, 0, 2, 0), (0, 9, 9, 0xD)]


def test_fadt_offers_reset_register_but_no_keyboard_controller() -> None:
    fadt = tables(FULL)["FACP"]
    assert len(fadt) == 276
    (boot_arch,) = struct.unpack_from("<H", fadt, 109)
    (flags,) = struct.unpack_from("<I", fadt, 112)
    assert boot_arch & 0x2 == 0
    assert flags & 1 << 10
    assert not flags & 1 << 20  # hardware-reduced
    assert struct.unpack_from("<BBBBQB", fadt, 116) == (1, 8, 0, 1, 0xCF9, 0x06)
    assert not struct.unpack_from("<I", tables(SMALL)["FACP"], 112)[0] & 1 << 10


def test_s5_package_is_what_linux_writes_to_pm1_control() -> None:
    assert b"\\_S5_\x12\x08\x04\x0a\x05\x0a\x05\x00\x00" in tables(FULL)["DSDT"]


def test_interrupt_pins_have_routes_only_where_there_are_some() -> None:
    route = b"\x12\x0b\x04\x0c\xff\xff\x04\x00\x00\x00\x0a\x14"  # device 4, pin A, GSI 20
    assert route in tables(FULL)["DSDT"]
    assert b"_PRT" not in tables(SMALL)["DSDT"]


def test_unaligned_block_is_refused() -> None:
    with pytest.raises(ValueError, match="not 64-byte aligned"):
        build_acpi(FULL, GPA + 16)


@pytest.mark.skipif(shutil.which("iasl") is None, reason="iasl is missing: apt-get install acpica-tools")
@pytest.mark.parametrize("config", [FULL, SMALL], ids=["full", "small"])
def test_iasl_disassembles_every_table_and_compiles_the_dsdt_again(
    config: AcpiConfig, tmp_path: Path
) -> None:
    for signature, table in tables(config).items():
        path = tmp_path / f"{signature}.aml"
        path.write_bytes(table)
        done = subprocess.run(
            ["iasl", "-d", str(path)], capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False
        )
        output = done.stdout + done.stderr
        assert done.returncode == 0, output
        assert "error" not in output.lower(), output
        assert "warning" not in output.lower(), output
    done = subprocess.run(
        ["iasl", "DSDT.dsl"], capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False
    )
    assert "0 Errors, 0 Warnings" in done.stdout + done.stderr, done.stdout + done.stderr
