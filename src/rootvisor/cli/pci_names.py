# SPDX-License-Identifier: Apache-2.0
"""Names of PCI devices and classes, from the list that distributions ship (pci.ids), as far as there is one."""

from __future__ import annotations

from pathlib import Path

_LISTS = ("/usr/share/misc/pci.ids", "/usr/share/hwdata/pci.ids")
#: Base classes (PCI Code and ID Assignment 1.11), for machines without the list.
_CLASSES = {
    0x00: "Unclassified device",
    0x01: "Mass storage controller",
    0x02: "Network controller",
    0x03: "Display controller",
    0x04: "Multimedia controller",
    0x05: "Memory controller",
    0x06: "Bridge",
    0x07: "Communication controller",
    0x08: "System peripheral",
    0x09: "Input device controller",
    0x0B: "Processor",
    0x0C: "Serial bus controller",
    0x0D: "Wireless controller",
    0x10: "Encryption controller",
    0x12: "Processing accelerator",
}


class PciNames:
    """The list, read once. Without one there are numbers, and names of base classes."""

    def __init__(self, lists: tuple[str, ...] = _LISTS) -> None:
        self._devices: dict[tuple[int, int | None], str] = {}
        self._classes: dict[tuple[int, int | None], str] = {}
        for path in lists:
            try:
                self._read(Path(path).read_text(encoding="utf-8", errors="replace"))
                return
            except OSError:
                continue

    def _read(self, text: str) -> None:
        """``VVVV  name``, below it ``<tab>DDDD  name``; classes have ``C `` in front and two digits."""
        table, upper = self._devices, 0
        for line in text.splitlines():
            if not line.strip() or line.startswith(("#", "\t\t")):
                continue
            number, _, name = line.strip().removeprefix("C ").partition("  ")
            try:
                value = int(number, 16)
            except ValueError:  # a list of another kind at the end of the file
                continue
            if line.startswith("\t"):
                table[upper, value] = name
            else:
                table, upper = (self._classes if line.startswith("C ") else self._devices), value
                table[upper, None] = name

    def device_name(self, vendor: int, device: int) -> str:
        """Vendor and device, as much of it as the list knows; empty when it knows neither."""
        known = (self._devices.get((vendor, None)), self._devices.get((vendor, device)))
        return " ".join(name for name in known if name)

    def class_name(self, class_code: int) -> str:
        """The class of a class code of 24 bits."""
        base, sub = class_code >> 16, class_code >> 8 & 0xFF
        return (
            self._classes.get((base, sub))
            or self._classes.get((base, None))
            or _CLASSES.get(base, f"Class {class_code >> 8:04x}")
        )
