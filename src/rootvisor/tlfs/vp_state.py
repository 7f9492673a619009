# SPDX-License-Identifier: Apache-2.0
"""VP state pages and VP state (``include/hyperv/hvhdk.h``: hv_vp_state_page_type, hv_get_set_vp_state_type)."""

from __future__ import annotations

from .layout import Layout

PAGE_REGISTERS = 0
PAGE_INTERCEPT_MESSAGE = 1
PAGE_GHCB = 2
MAP_LOCATION_PROVIDED = 1 << 0
MAP_VP_STATE_PAGE_INPUT = Layout(
    "hv_input_map_vp_state_page", 24,
    "partition_id:Q", "vp_index:I", "type:H", "input_vtl:B", "flags:B", "requested_map_location:Q",
)  # fmt: skip
MAP_VP_STATE_PAGE_OUTPUT = Layout("hv_output_map_vp_state_page", 8, "map_location:Q")
UNMAP_VP_STATE_PAGE_INPUT = Layout(
    "hv_input_unmap_vp_state_page", 16, "partition_id:Q", "vp_index:I", "type:H", "input_vtl:B", "reserved0:B"
)

#: Types with this bit travel through pages of the caller, the others inline.
TYPE_PFN = 1 << 31
LAPIC = 0 | TYPE_PFN
XSAVE = 1 | TYPE_PFN
SIM_PAGE = 2 | TYPE_PFN
SIEF_PAGE = 3 | TYPE_PFN
SYNTHETIC_TIMERS = 4
#: Fixed part; page numbers or data follow as the variable header.
VP_STATE_INPUT = Layout(
    "hv_input_get_vp_state", 40,
    "partition_id:Q", "vp_index:I", "input_vtl:B", "rsvd0:B", "rsvd1:H", "type:I", "rsvd:I", "xsave_flags:Q",
    "xsave_states:Q",
)  # fmt: skip

#: hv_local_interrupt_controller_state: 44 u32; the order of the fields, as offsets in the local APIC's register page.
LAPIC_SIZE = 176
LAPIC_REGISTERS = (
    0x20, 0x30, 0xD0, 0xE0, 0xF0,
    *range(0x100, 0x180, 0x10), *range(0x180, 0x200, 0x10), *range(0x200, 0x280, 0x10),
    0x280, 0x310, 0x300, 0x320, 0x330, 0x340, 0x350, 0x360, 0x370, 0x2F0,
    None, 0x380, 0x390, 0x3E0, None,
)  # fmt: skip
"""None: error_status and remote_read, which are no registers."""
LAPIC_ID = 0
LAPIC_IRR = 21
LAPIC_INITIAL_COUNT = 40
LAPIC_CURRENT_COUNT = 41
#: In the first IRR word: an NMI is pending.
LAPIC_IRR_NMI = 1 << 2

#: hv_synthetic_timers_state: four hv_stimer_state and 40 reserved bytes.
STIMERS_SIZE = 200
STIMER = Layout(
    "hv_stimer_state", 40,
    "flags:I", "resvd:I", "config:Q", "count:Q", "adjustment:Q", "undelivered_exp_time:Q",
)  # fmt: skip

# XSAVE image
XSAVE_LEGACY_SIZE = 512
XSAVE_HEADER_SIZE = 64
XSAVE_COMPACTED = 1 << 63
