# SPDX-License-Identifier: Apache-2.0
"""Registers of the processors before the first instruction."""

from __future__ import annotations

from ..mshv import Segment, Table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..boot.entry_state import EntryState
    from ..mshv import Vp

#: Default memory type write-back, MTRRs on, no ranges: as firmware leaves them. Without it memory is uncached.
_MTRR_DEFAULT_TYPE = 0xC06


def set_entry_state(vp: Vp, entry: EntryState) -> None:
    """Puts the boot processor at the kernel's entry. The others wait for their SIPI."""
    segments: dict[str | int, int | Segment | Table] = {
        "ldtr" if name == "ldt" else name: Segment(base, limit, selector, _attributes(*rest))
        for name, (base, limit, selector, *rest) in entry.segments.items()
    }
    vp.set_registers(
        {
            "efer": entry.efer,
            "cr0": entry.cr0,
            "cr3": entry.cr3,
            "cr4": entry.cr4,
            **segments,
            "gdtr": Table(entry.gdt_base, entry.gdt_limit),
            "idtr": Table(0, 0),
            "rip": entry.rip,
            "rsi": entry.rsi,
            "rflags": entry.rflags,
        }
    )


def set_firmware_state(vp: Vp) -> None:
    """What firmware does on every processor."""
    vp.set_registers(mtrr_def_type=_MTRR_DEFAULT_TYPE)


def _attributes(
    kind: int, present: int, dpl: int, db: int, system: int, long: int, granularity: int, avl: int
) -> int:
    return (
        kind | system << 4 | dpl << 5 | present << 7 | avl << 12 | long << 13 | db << 14 | granularity << 15
    )
