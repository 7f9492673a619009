# SPDX-License-Identifier: Apache-2.0
"""A stopped processor's state as plain data, and back."""

from __future__ import annotations

from ..mshv import MshvError, vp_calls
from ..mshv.vp import STATE_LAPIC, STATE_SIEFP, STATE_SIMP, STATE_SYNTHETIC_TIMERS, STATE_XSAVE
from ..tlfs import registers as names
from .controller import MachineError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..mshv import Vp

#: In the order in which they are written back: modes before what depends on them, the clock late, events last.
_REGISTERS = (
    names.APIC_BASE, names.EFER, names.CR0, names.CR3, names.CR4, names.CR2, names.CR8, names.XFEM,
    *range(names.RAX, names.RFLAGS + 1),
    names.ES, names.CS, names.SS, names.DS, names.FS, names.GS, names.LDTR, names.TR, names.IDTR, names.GDTR,
    *range(names.DR0, names.DR7 + 1),
    names.KERNEL_GS_BASE, names.PAT, names.SYSENTER_CS, names.SYSENTER_EIP, names.SYSENTER_ESP, names.STAR,
    names.LSTAR, names.CSTAR, names.SFMASK, names.TSC_AUX, names.MISC_ENABLE, names.SPEC_CTRL, names.DEBUG_CTL,
    names.U_XSS, names.U_CET, names.S_CET, names.SSP, names.PL0_SSP, names.PL1_SSP, names.PL2_SSP, names.PL3_SSP,
    names.INTERRUPT_SSP_TABLE,
    names.MTRR_DEF_TYPE, *range(names.MTRR_PHYS_BASE0, names.MTRR_PHYS_BASE0 + 16),
    *range(names.MTRR_PHYS_MASK0, names.MTRR_PHYS_MASK0 + 16), *range(names.MTRR_FIX64K00000, names.TSC_AUX),
    names.GUEST_OS_ID, names.HYPERCALL, names.VP_ASSIST_PAGE, names.REFERENCE_TSC,
    names.SVERSION, names.SIEFP, names.SIMP, *range(names.SINT0, names.SINT0 + 16), names.SCONTROL,
    *range(names.GUEST_CRASH_P0, names.GUEST_CRASH_CTL),
)  # fmt: skip
#: After the local APIC's state: they arm its timer and give what it holds.
_LATE_REGISTERS = (
    names.TSC_ADJUST, names.TSC, names.TSC_DEADLINE, names.INTERRUPT_STATE, names.PENDING_INTERRUPTION,
    names.PENDING_EVENT0, names.PENDING_EVENT1, names.INTERNAL_ACTIVITY_STATE,
)  # fmt: skip
#: The state of a SynIC is only there where the guest has one.
_STATES = (STATE_XSAVE, STATE_LAPIC, STATE_SIMP, STATE_SIEFP, STATE_SYNTHETIC_TIMERS)


def save_processor(vp: Vp) -> dict[str, Any]:
    """Everything about ``vp`` that the hypervisor tells. What it or the processor does not have is left out."""
    states = {}
    for kind in _STATES:
        try:
            states[kind] = vp.get_state(kind)
        except MshvError:
            if kind in (STATE_XSAVE, STATE_LAPIC):
                raise
    return {"registers": _get(vp, _REGISTERS), "late": _get(vp, _LATE_REGISTERS), "states": states}


def restore_processor(vp: Vp, saved: dict[str, Any]) -> None:
    """Puts ``vp`` where it was. MachineError when the hypervisor does not take it."""
    _set(vp, saved["registers"])
    for kind, state in saved["states"].items():
        vp.set_state(kind, state)
    _set(vp, saved["late"])


def _get(vp: Vp, numbers: tuple[int, ...]) -> list[tuple[int, int]]:
    """Values of the registers that there are. A call with one that there is not says how far it came."""
    values: list[tuple[int, int]] = []
    left = list(numbers)
    while left:
        try:
            got = vp.get_registers(*left)
        except MshvError as error:
            known = min(error.reps, len(left) - 1)
            values += zip(left, vp.get_registers(*left[:known]) if known else (), strict=False)
            left = left[known + 1 :]
        else:
            values += zip(left, got, strict=True)
            break
    return values


def _set(vp: Vp, pairs: list[tuple[int, int]]) -> None:
    """Writes registers back. One that cannot be written, or not so, must have its value already."""
    left = list(pairs)
    while left:
        try:
            vp_calls.set_registers(vp, vp.index, left)
            return
        except MshvError as error:
            number, value = left[error.reps]
            if vp.get_registers(number)[0] != value:
                raise MachineError(
                    f"the hypervisor does not take {names.register_name(number)} = {value:#x} of processor {vp.index}"
                ) from error
            left = left[error.reps + 1 :]
