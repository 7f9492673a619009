# SPDX-License-Identifier: Apache-2.0
"""Guest physical memory of partitions: MAP_GPA_PAGES and its relatives (``include/hyperv/hvhdk.h``)."""

from __future__ import annotations

from .layout import Layout

MAP_GPA_PAGES_INPUT = Layout(
    "hv_input_map_gpa_pages", 24, "target_partition_id:Q", "target_gpa_base:Q", "map_flags:I", "_:4x"
)
UNMAP_GPA_PAGES_INPUT = Layout(
    "hv_input_unmap_gpa_pages", 24, "target_partition_id:Q", "target_gpa_base:Q", "unmap_flags:I", "_:4x"
)
GET_GPA_PAGES_ACCESS_STATES_INPUT = Layout(
    "hv_input_get_gpa_pages_access_state", 24, "partition_id:Q", "flags:Q", "hv_gpa_page_number:Q"
)

MAP_READABLE = 0x1
MAP_WRITABLE = 0x2
MAP_KERNEL_EXECUTABLE = 0x4
MAP_USER_EXECUTABLE = 0x8
MAP_ADJUSTABLE = 0x8000
MAP_NO_ACCESS = 0x10000
MAP_NOT_CACHED = 0x200000
MAP_LARGE_PAGE = 0x80000000
MAP_KNOWN = (
    MAP_READABLE | MAP_WRITABLE | MAP_KERNEL_EXECUTABLE | MAP_USER_EXECUTABLE | MAP_ADJUSTABLE | MAP_NO_ACCESS
    | MAP_NOT_CACHED | MAP_LARGE_PAGE
)  # fmt: skip
UNMAP_LARGE_PAGE = 0x2
#: 4 KiB pages in a large one.
LARGE_PAGES = 512

ACCESS_CLEAR_ACCESSED = 1
ACCESS_SET_ACCESSED = 2
ACCESS_CLEAR_DIRTY = 4
ACCESS_SET_DIRTY = 8
ACCESS_KNOWN = ACCESS_CLEAR_ACCESSED | ACCESS_SET_ACCESSED | ACCESS_CLEAR_DIRTY | ACCESS_SET_DIRTY
STATE_ACCESSED = 1
STATE_DIRTY = 2
