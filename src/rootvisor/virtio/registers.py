# SPDX-License-Identifier: Apache-2.0
"""Numbers of virtio 1.2 shared by all devices: feature bits, device status, ids, PCI layout, ring flags."""

from __future__ import annotations

# Device ids (section 5).
DEVICE_NET = 1
DEVICE_BLOCK = 2
DEVICE_CONSOLE = 3
DEVICE_RNG = 4
DEVICE_BALLOON = 5
DEVICE_VSOCK = 19
DEVICE_FS = 26

# Device status (section 2.1).
STATUS_ACKNOWLEDGE = 1
STATUS_DRIVER = 2
STATUS_DRIVER_OK = 4
STATUS_FEATURES_OK = 8
STATUS_NEEDS_RESET = 64
STATUS_FAILED = 128

# Reserved feature bits (section 6), as masks.
F_INDIRECT_DESC = 1 << 28
F_EVENT_IDX = 1 << 29
F_VERSION_1 = 1 << 32
F_RING_PACKED = 1 << 34
F_RING_RESET = 1 << 40

# Descriptor flags (2.7.5 and 2.8).
DESC_NEXT = 1
DESC_WRITE = 2
DESC_INDIRECT = 4

# ISR status (4.1.4.5).
ISR_QUEUE = 1
ISR_CONFIG = 2

# PCI (4.1).
PCI_VENDOR_ID = 0x1AF4
PCI_DEVICE_ID_BASE = 0x1040
PCI_CAP_COMMON = 1
PCI_CAP_NOTIFY = 2
PCI_CAP_ISR = 3
PCI_CAP_DEVICE = 4
PCI_CAP_PCI = 5
NO_VECTOR = 0xFFFF

MAX_QUEUE_SIZE = 32768
