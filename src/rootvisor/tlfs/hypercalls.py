# SPDX-License-Identifier: Apache-2.0
"""Hypercall codes, the control word, and input and output layouts (TLFS "Hypercall Interface"; ``include/hyperv``)."""

from __future__ import annotations

from .layout import Layout

# --- control word (RCX) and result (RAX) --------------------------------------------------------------------------
CONTROL_CODE = 0xFFFF
CONTROL_FAST = 1 << 16
CONTROL_VARIABLE_SHIFT = 17  # variable header size in 8-byte units, 10 bits
CONTROL_REP_COUNT_SHIFT = 32  # 12 bits
CONTROL_REP_START_SHIFT = 48  # 12 bits
#: 30:27, 31 (nested), 47:44, 63:60.
CONTROL_RESERVED = 0xF000_F000_F800_0000
RESULT_REPS_SHIFT = 32

#: Codes of extended hypercalls: the first one tells by 64 bits which of the others there are.
CODE_EXTENDED_FIRST, CODE_EXTENDED_LAST = 0x8001, 0x8041

SELF = 0xFFFF_FFFF_FFFF_FFFF

# --- codes --------------------------------------------------------------------------------------------------------
SWITCH_VIRTUAL_ADDRESS_SPACE = 0x0001
FLUSH_VIRTUAL_ADDRESS_SPACE = 0x0002
FLUSH_VIRTUAL_ADDRESS_LIST = 0x0003
GET_LOGICAL_PROCESSOR_RUN_TIME = 0x0004
NOTIFY_LONG_SPIN_WAIT = 0x0008
SEND_IPI = 0x000B
MODIFY_VTL_PROTECTION_MASK = 0x000C
ENABLE_PARTITION_VTL = 0x000D
ENABLE_VP_VTL = 0x000F
VTL_CALL = 0x0011
VTL_RETURN = 0x0012
FLUSH_VIRTUAL_ADDRESS_SPACE_EX = 0x0013
FLUSH_VIRTUAL_ADDRESS_LIST_EX = 0x0014
SEND_IPI_EX = 0x0015
CREATE_PARTITION = 0x0040
INITIALIZE_PARTITION = 0x0041
FINALIZE_PARTITION = 0x0042
DELETE_PARTITION = 0x0043
GET_PARTITION_PROPERTY = 0x0044
SET_PARTITION_PROPERTY = 0x0045
GET_PARTITION_ID = 0x0046
DEPOSIT_MEMORY = 0x0048
WITHDRAW_MEMORY = 0x0049
MAP_GPA_PAGES = 0x004B
UNMAP_GPA_PAGES = 0x004C
INSTALL_INTERCEPT = 0x004D
CREATE_VP = 0x004E
DELETE_VP = 0x004F
GET_VP_REGISTERS = 0x0050
SET_VP_REGISTERS = 0x0051
TRANSLATE_VIRTUAL_ADDRESS = 0x0052
CLEAR_VIRTUAL_INTERRUPT = 0x0056
DELETE_PORT = 0x0058
DISCONNECT_PORT = 0x005B
POST_MESSAGE = 0x005C
SIGNAL_EVENT = 0x005D
MAP_STATS_PAGE = 0x006C
UNMAP_STATS_PAGE = 0x006D
SET_SYSTEM_PROPERTY = 0x006F
ADD_LOGICAL_PROCESSOR = 0x0076
GET_SYSTEM_PROPERTY = 0x007B
MAP_DEVICE_INTERRUPT = 0x007C
UNMAP_DEVICE_INTERRUPT = 0x007D
RETARGET_DEVICE_INTERRUPT = 0x007E
ENTER_SLEEP_STATE = 0x0084
NOTIFY_PARTITION_EVENT = 0x0087
NOTIFY_PORT_RING_EMPTY = 0x008B
REGISTER_INTERCEPT_RESULT = 0x0091
ASSERT_VIRTUAL_INTERRUPT = 0x0094
CREATE_PORT = 0x0095
CONNECT_PORT = 0x0096
START_VIRTUAL_PROCESSOR = 0x0099
GET_VP_INDEX_FROM_APIC_ID = 0x009A
SIGNAL_EVENT_DIRECT = 0x00C0
POST_MESSAGE_DIRECT = 0x00C1
DISPATCH_VP = 0x00C2
GET_GPA_PAGES_ACCESS_STATES = 0x00C9
VTL_ACCESS_CHECK = 0x00D4
ACCEPT_GPA_PAGES = 0x00D9
MODIFY_SPARSE_GPA_PAGE_HOST_VISIBILITY = 0x00DB
MAP_VP_STATE_PAGE = 0x00E1
UNMAP_VP_STATE_PAGE = 0x00E2
GET_VP_STATE = 0x00E3
SET_VP_STATE = 0x00E4
GET_VP_CPUID_VALUES = 0x00F4
GET_PARTITION_PROPERTY_EX = 0x0101
QUERY_SPARSE_GPA_PAGE_HOST_VISIBILITY = 0x011C
EXT_QUERY_CAPABILITIES = 0x8001

NAMES = {
    value: name
    for name, value in list(globals().items())
    if name.isupper()
    and isinstance(value, int)
    and not name.startswith(("CONTROL_", "RESULT_", "SELF", "CODE_"))
}

# --- inputs and outputs -------------------------------------------------------------------------------------------
#: A partition id alone: output of GET_PARTITION_ID and others.
PARTITION_ID = Layout("hv_output_get_partition_id", 8, "partition_id:Q")
GET_LOGICAL_PROCESSOR_RUN_TIME_INPUT = Layout("hv_input_get_logical_processor_run_time", 4, "lp_index:I")
GET_LOGICAL_PROCESSOR_RUN_TIME_OUTPUT = Layout(
    "hv_output_get_logical_processor_run_time", 32,
    "global_time:Q", "local_run_time:Q", "rsvdz0:Q", "hypervisor_time:Q",
)  # fmt: skip
ADD_LOGICAL_PROCESSOR_INPUT = Layout(
    "hv_input_add_logical_processor",
    16,
    "lp_index:I",
    "apic_id:I",
    "proximity_domain_id:I",
    "proximity_flags:I",
)
ADD_LOGICAL_PROCESSOR_OUTPUT = Layout("hv_output_add_logical_processor", 56, "status:Q", "detail:48s")
CREATE_VP_INPUT = Layout(
    "hv_create_vp", 40,
    "partition_id:Q", "vp_index:I", "_:3x", "subnode_type:B", "subnode_id:Q", "proximity_domain_info:Q", "flags:Q",
)  # fmt: skip
DEPOSIT_MEMORY_INPUT = Layout("hv_deposit_memory", 8, "partition_id:Q")
WITHDRAW_MEMORY_INPUT = Layout("hv_input_withdraw_memory", 16, "partition_id:Q", "proximity_domain_info:Q")
MAP_STATS_PAGE_INPUT = Layout("hv_input_map_stats_page", 24, "type:I", "_:4x", "identity:16s")
MAP_STATS_PAGE_OUTPUT = Layout("hv_output_map_stats_page", 8, "map_location:Q")
SET_SYSTEM_PROPERTY_INPUT = Layout(
    "hv_input_set_system_property", 72, "property_id:I", "reserved:I", "value:64s"
)
GET_SYSTEM_PROPERTY_INPUT = Layout(
    "hv_input_get_system_property", 16, "property_id:I", "reserved:I", "argument:Q"
)
GET_SYSTEM_PROPERTY_OUTPUT = Layout("hv_output_get_system_property", 8, "value:Q")
#: Fixed part up to and with the set format; bank mask and banks are the variable header (contract 4.2).
MAP_DEVICE_INTERRUPT_INPUT = Layout(
    "hv_input_map_device_interrupt", 72,
    "partition_id:Q", "device_id:Q", "flags:Q", "logical_entry:16s", "interrupt_type:I", "trigger_mode:I",
    "vector_count:I", "_:4x", "vector:I", "target_flags:I", "set_format:Q",
)  # fmt: skip
DEVICE_INTERRUPT_OUTPUT = Layout(
    "hv_output_map_device_interrupt", 16, "source:I", "reserved:I", "low:I", "high:I"
)
UNMAP_DEVICE_INTERRUPT_INPUT = Layout(
    "hv_input_unmap_device_interrupt",
    32,
    "partition_id:Q",
    "device_id:Q",
    "source:I",
    "reserved:I",
    "low:I",
    "high:I",
)
RETARGET_DEVICE_INTERRUPT_INPUT = Layout(
    "hv_retarget_device_interrupt", 56,
    "partition_id:Q", "device_id:Q", "source:I", "reserved:I", "address:I", "data:I", "reserved2:Q",
    "vector:I", "target_flags:I", "mask_or_format:Q",
)  # fmt: skip
ENTER_SLEEP_STATE_INPUT = Layout("hv_input_enter_sleep_state", 4, "sleep_state:I")
NOTIFY_PARTITION_EVENT_INPUT = Layout("hv_input_notify_partition_event", 8, "event:I", "argument:I")
GET_PARTITION_PROPERTY_INPUT = Layout(
    "hv_input_get_partition_property", 16, "partition_id:Q", "code:I", "_:4x"
)
SET_PARTITION_PROPERTY_INPUT = Layout(
    "hv_input_set_partition_property", 24, "partition_id:Q", "code:I", "_:4x", "value:Q"
)
GET_PARTITION_PROPERTY_EX_INPUT = Layout(
    "hv_input_get_partition_property_ex", 24, "partition_id:Q", "code:I", "_:4x", "argument:Q"
)
VP_REGISTERS_INPUT = Layout(
    "hv_input_get_vp_registers", 16, "partition_id:Q", "vp_index:I", "input_vtl:B", "rsvd:3s"
)
GET_VP_INDEX_FROM_APIC_ID_INPUT = Layout(
    "hv_input_get_vp_index_from_apic_id", 16, "partition_id:Q", "target_vtl:B", "_:7x"
)
SEND_IPI_INPUT = Layout("hv_send_ipi", 16, "vector:I", "target_vtl:B", "reserved:3s", "cpu_mask:Q")
SEND_IPI_EX_INPUT = Layout(
    "hv_send_ipi_ex", 24, "vector:I", "target_vtl:B", "reserved:3s", "set_format:Q", "bank_mask:Q"
)
SWITCH_VIRTUAL_ADDRESS_SPACE_INPUT = Layout("hv_switch_virtual_address_space", 8, "cr3:Q")
START_VIRTUAL_PROCESSOR_INPUT = Layout(
    "hv_enable_vp_vtl", 240, "partition_id:Q", "vp_index:I", "target_vtl:B", "_:3x", "context:224s"
)
#: Where a VP starts (struct hv_init_vp_context): segments are base, limit, selector, attributes.
VP_CONTEXT = Layout(
    "hv_init_vp_context", 224,
    "rip:Q", "rsp:Q", "rflags:Q", "cs:16s", "ds:16s", "es:16s", "fs:16s", "gs:16s", "ss:16s", "tr:16s", "ldtr:16s",
    "idtr:16s", "gdtr:16s", "efer:Q", "cr0:Q", "cr3:Q", "cr4:Q", "pat:Q",
)  # fmt: skip
SEGMENT = Layout("hv_x64_segment_register", 16, "base:Q", "limit:I", "selector:H", "attributes:H")
DESCRIPTOR_TABLE = Layout("hv_x64_table_register", 16, "_:6x", "limit:H", "base:Q")
FLUSH_INPUT = Layout("hv_tlb_flush", 24, "address_space:Q", "flags:Q", "processor_mask:Q")
FLUSH_EX_INPUT = Layout("hv_tlb_flush_ex", 32, "address_space:Q", "flags:Q", "set_format:Q", "bank_mask:Q")
NOTIFY_LONG_SPIN_WAIT_INPUT = Layout("hv_input_notify_long_spin_wait", 8, "spin_count:I", "_:4x")

INTERRUPT_SOURCE_MSI = 1
INTERRUPT_SOURCE_IO_APIC = 2
DEVICE_TYPE_PCI = 1
DEVICE_TYPE_IO_APIC = 2
TARGET_PROCESSOR_SET = 2

# stats object types (hv_stats_object_type) and areas
STATS_HYPERVISOR = 1
STATS_LOGICAL_PROCESSOR = 2
STATS_PARTITION = 0x10001
STATS_VP = 0x10002
STATS_AREA_SELF = 0
STATS_AREA_PARENT = 1

SYSTEM_PROPERTY_SLEEP_STATE = 3
SYSTEM_PROPERTY_SCHEDULER_TYPE = 15
SYSTEM_PROPERTY_CRASHDUMP_AREA = 47
SCHEDULER_HYPERVISOR = 3  # core scheduler: the hypervisor runs the VPs
SCHEDULER_ROOT = 4

PARTITION_PROPERTY_VMM_CAPABILITIES = 0x00090007


def call_name(code: int) -> str:
    """``HVCALL_X``, or the number for a code that is not known here."""
    name = NAMES.get(code)
    return f"HVCALL_{name}" if name else f"{code:#06x}"
