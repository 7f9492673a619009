# SPDX-License-Identifier: Apache-2.0
"""A folder that looks like the parts of sysfs and proc that tell of PCI devices."""

from __future__ import annotations

from pathlib import Path


class FakeHost:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.devices = root / "sys/bus/pci/devices"
        self.devices.mkdir(parents=True)
        self.proc = root / "proc"
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "net").mkdir()
        (self.proc / "self/mountinfo").write_text("")
        (self.proc / "swaps").write_text("Filename Type Size Used Priority\n")
        self.dev = root / "dev/vfio"
        self.dev.mkdir(parents=True)
        (self.dev / "vfio").touch()

    def add(
        self,
        address: str,
        *,
        group: int | None = 1,
        driver: str = "",
        class_code: int = 0x020000,
        header: int = 0,
    ) -> Path:
        folder = self.devices / address
        folder.mkdir()
        for name, value in (("vendor", 0x8086), ("device", 0x10D3), ("class", class_code)):
            (folder / name).write_text(f"{value:#06x}\n")
        (folder / "config").write_bytes(bytes(0x0E) + bytes([0x80 | header]) + bytes(49))
        (folder / "driver_override").write_text("(null)\n")
        if driver:
            target = self.root / "sys/bus/pci/drivers" / driver
            target.mkdir(parents=True, exist_ok=True)
            (folder / "driver").symlink_to(target)
        if group is not None:
            members = self.root / f"sys/kernel/iommu_groups/{group}/devices"
            members.mkdir(parents=True, exist_ok=True)
            (members / address).symlink_to(folder)
            (folder / "iommu_group").symlink_to(members.parent)
        return folder
