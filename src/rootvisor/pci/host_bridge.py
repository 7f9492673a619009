# SPDX-License-Identifier: Apache-2.0
"""The host bridge, function 00:00.0. Linux's legacy probe for ports 0xCF8..0xCFF looks for one on bus 0."""

from __future__ import annotations

from .function import PciFunction

_VENDOR_MICROSOFT = 0x1414
_DEVICE_HOST_BRIDGE = 0x00F0
_CLASS_HOST_BRIDGE = 0x060000


class HostBridge(PciFunction):
    """A bridge without registers of its own; windows are described by ACPI."""

    def __init__(self) -> None:
        super().__init__(_VENDOR_MICROSOFT, _DEVICE_HOST_BRIDGE, _CLASS_HOST_BRIDGE, express=False)
