# SPDX-License-Identifier: Apache-2.0
"""Creation and properties of partitions (``include/hyperv/hvhdk.h``: hv_input_create_partition, property codes)."""

from __future__ import annotations

from .layout import Layout

CREATE_PARTITION_INPUT = Layout(
    "hv_input_create_partition", 56,
    "flags:Q", "proximity_domain_info:Q", "compatibility_version:I", "_:4x", "disabled_features0:Q",
    "disabled_features1:Q", "disabled_xsave:Q", "isolation:Q",
)  # fmt: skip
PARTITION_ONLY_INPUT = Layout("hv_input_initialize_partition", 8, "partition_id:Q")
DELETE_VP_INPUT = Layout("hv_input_delete_vp", 12, "partition_id:Q", "vp_index:I")
PROPERTY_OUTPUT = Layout("hv_output_get_partition_property", 8, "property_value:Q")

FLAG_SMT = 1 << 0
FLAG_NESTED = 1 << 1
FLAG_GPA_SUPER_PAGES = 1 << 4
FLAG_EXO = 1 << 8
FLAG_LAPIC = 1 << 13
FLAG_INTERCEPT_MESSAGE_PAGE = 1 << 19
FLAG_X2APIC = 1 << 22

PRIVILEGE_FLAGS = 0x10000
SYNTHETIC_PROC_FEATURES = 0x10001
TIME_FREEZE = 0x30003
REFERENCE_TIME = 0x30005
PROCESSORS_PER_SOCKET = 0x50003
GPA_PAGE_ACCESS_TRACKING = 0x50005
UNIMPLEMENTED_MSR_ACTION = 0x50017
PROCESSOR_VENDOR = 0x60000
XSAVE_FEATURES = 0x60002
PHYSICAL_ADDRESS_WIDTH = 0x60006
XSAVE_STATES = 0x60007
MAX_XSAVE_DATA_SIZE = 0x60008
PROCESSOR_CLOCK_FREQUENCY = 0x60009
PROCESSOR_FEATURES0 = 0x6000A
PROCESSOR_FEATURES1 = 0x6000B
VMM_CAPABILITIES = 0x90007
ASSIGNABLE_SYNTHETIC_PROC_FEATURES = 0x90009
PROPERTY_EX_OUTPUT_SIZE = 4072

VENDOR_AMD, VENDOR_INTEL, VENDOR_HYGON = range(3)
MSR_ACTION_FAULT, MSR_ACTION_IGNORE = range(2)

# bits of SYNTHETIC_PROC_FEATURES
SYNTHETIC_HYPERVISOR_PRESENT = 1 << 0
SYNTHETIC_HV1 = 1 << 1
SYNTHETIC_REFERENCE_COUNTER = 1 << 3
SYNTHETIC_SYNIC = 1 << 4
SYNTHETIC_APIC_MSRS = 1 << 6
SYNTHETIC_HYPERCALL_MSRS = 1 << 7
SYNTHETIC_VP_INDEX = 1 << 8
SYNTHETIC_REFERENCE_TSC = 1 << 9
SYNTHETIC_FREQUENCY = 1 << 11
SYNTHETIC_FAST_OUTPUT = 1 << 18
SYNTHETIC_SIGNAL_EVENTS = 1 << 29
SYNTHETIC_VP_REGISTERS = 1 << 38
