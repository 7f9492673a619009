# SPDX-License-Identifier: Apache-2.0
"""Kernel images, the Linux/x86 boot protocol, ACPI tables and the initial ramdisk.

Boot path (cheap imports only): :mod:`.kernel`, :mod:`.initrd`, :mod:`.zero_page`, :mod:`.entry_state`,
:mod:`.acpi`. Assembly, which runs before any partition exists: :mod:`.busybox`, :mod:`.modules`,
:mod:`.cpio`, :mod:`.initramfs`.
"""

from __future__ import annotations
