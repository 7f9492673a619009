# SPDX-License-Identifier: Apache-2.0
"""Register names, the register page and VP state against the kernel's headers."""

from __future__ import annotations

import re
from pathlib import Path

from rootvisor.tlfs import registers, vp_state
from rootvisor.tlfs.layout import Layout

from .test_layouts import headers, probe

__all__ = ["headers"]

LAYOUTS = (
    vp_state.MAP_VP_STATE_PAGE_INPUT,
    vp_state.MAP_VP_STATE_PAGE_OUTPUT,
    vp_state.UNMAP_VP_STATE_PAGE_INPUT,
    vp_state.VP_STATE_INPUT,
    vp_state.STIMER,
)
MEMBERS = {
    "type": "state_data.type",
    "rsvd": "state_data.rsvd",
    "xsave_flags": "state_data.xsave.flags",
    "xsave_states": "state_data.xsave.states",
}
PAGE = {
    "isvalid": registers.PAGE_VALID,
    "dirty": registers.PAGE_DIRTY,
    "rax": registers.PAGE_GENERAL,
    "rip": registers.PAGE_RIP,
    "rflags": registers.PAGE_RFLAGS,
    "xmm0": registers.PAGE_XMM,
    "es": registers.PAGE_SEGMENTS,
    "cr0": registers.PAGE_CR0,
    "cr3": registers.PAGE_CR3,
    "cr4": registers.PAGE_CR4,
    "cr8": registers.PAGE_CR8,
    "efer": registers.PAGE_EFER,
    "dr7": registers.PAGE_DR7,
    "pending_interruption": registers.PAGE_PENDING_INTERRUPTION,
    "interrupt_state": registers.PAGE_INTERRUPT_STATE,
    "instruction_emulation_hints": registers.PAGE_EMULATION_HINTS,
    "xfem": registers.PAGE_XFEM,
    "interrupt_vectors": registers.PAGE_INTERRUPT_VECTORS,
}


def test_state_layouts_and_the_register_page_are_the_kernels(headers: Path, tmp_path: Path) -> None:
    lines = [f'P("page.{member}", offsetof(struct hv_vp_register_page, {member}));' for member in PAGE]
    wanted = {f"page.{member}": offset for member, offset in PAGE.items()}
    lines.append('P("stimers", sizeof(struct hv_synthetic_timers_state));')
    wanted["stimers"] = vp_state.STIMERS_SIZE
    for layout in LAYOUTS:
        assert isinstance(layout, Layout)
        lines.append(f'P("{layout.name}", sizeof(struct {layout.name}));')
        wanted[layout.name] = layout.size
        for field, offset in zip(layout.fields, layout.offsets, strict=True):
            member = MEMBERS.get(field, field) if layout is vp_state.VP_STATE_INPUT else field
            lines.append(f'P("{layout.name}.{field}", offsetof(struct {layout.name}, {member}));')
            wanted[f"{layout.name}.{field}"] = offset
    for name, number in {
        "HV_GET_SET_VP_STATE_LAPIC_STATE": vp_state.LAPIC,
        "HV_GET_SET_VP_STATE_XSAVE": vp_state.XSAVE,
        "HV_GET_SET_VP_STATE_SIM_PAGE": vp_state.SIM_PAGE,
        "HV_GET_SET_VP_STATE_SIEF_PAGE": vp_state.SIEF_PAGE,
        "HV_GET_SET_VP_STATE_SYNTHETIC_TIMERS": vp_state.SYNTHETIC_TIMERS,
        "HV_VP_STATE_PAGE_REGISTERS": vp_state.PAGE_REGISTERS,
        "HV_VP_STATE_PAGE_INTERCEPT_MESSAGE": vp_state.PAGE_INTERCEPT_MESSAGE,
    }.items():
        lines.append(f'P("{name}", (unsigned int){name});')
        wanted[name] = number
    assert probe(headers, tmp_path, lines) == wanted


def test_register_names_have_the_kernels_numbers(headers: Path) -> None:
    text = (headers / "hyperv" / "hvgdk_mini.h").read_text()
    found = {
        name: int(number, 16)
        for name, number in re.findall(r"\bHV_(?:X64_)?REGISTER_(?:MSR_)?(\w+)\s*=\s*(0x[0-9A-Fa-f]+)", text)
    }
    ours = {
        name: number for name, number in vars(registers).items() if name.isupper() and isinstance(number, int)
    }
    ours |= {f"SINT{n}": registers.SINT0 + n for n in range(16)}
    for kind in ("BASE", "MASK"):
        first = ours[f"MTRR_PHYS_{kind}0"]
        ours |= {f"MTRR_PHYS_{kind}{n:X}": first + n for n in range(16)}
    common = found.keys() & ours.keys()
    assert {name: found[name] for name in common} == {name: ours[name] for name in common}
    assert len(common) > 70
