# SPDX-License-Identifier: Apache-2.0
"""Puts a Linux kernel into a computer's RAM, with everything that it finds there at its first instruction."""

from __future__ import annotations

from . import memory_map
from .acpi import build_acpi
from .entry_state import EntryState, write_entry_tables
from .initrd import load_initrd
from .kernel import load_kernel
from .zero_page import initrd_limit, write_setup_data, write_zero_page

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .acpi import AcpiConfig
    from .memory_map import MemoryMap


def load_linux(
    low: memoryview,
    layout: MemoryMap,
    *,
    kernel: str,
    initrds: Sequence[str | bytes],
    command_line: str,
    acpi: AcpiConfig,
) -> EntryState:
    """Kernel, initial ramdisk, ACPI tables and zero page go into ``low``, the RAM below 4 GiB; the boot processor's
    state. Raises :class:`~rootvisor.boot.errors.BootError` for files or sizes that do not work."""
    loaded = load_kernel(kernel, low)
    limit = min(initrd_limit(loaded, layout.low), layout.initrd_end)
    initrd = load_initrd(initrds, low, loaded.end_gpa, limit)
    tables = build_acpi(acpi, memory_map.ACPI_TABLES)
    low[memory_map.ACPI_TABLES : memory_map.ACPI_TABLES + len(tables)] = tables
    if layout.owned_pages:
        length = memory_map.HYPERVISOR_NODE_HEADER - 16 + layout.owned_pages * memory_map.PAGE
        write_setup_data(low, layout.node_gpa, length)
    write_zero_page(
        low,
        memory_map.ZERO_PAGE,
        loaded,
        e820=layout.e820(),
        cmdline=command_line.encode(),
        cmdline_gpa=memory_map.COMMAND_LINE,
        initrd=initrd,
        rsdp_gpa=memory_map.ACPI_TABLES,
        setup_data_gpa=layout.node_gpa,
    )
    write_entry_tables(low, memory_map.ENTRY_TABLES)
    return EntryState(loaded.rip, memory_map.ZERO_PAGE, memory_map.ENTRY_TABLES)
