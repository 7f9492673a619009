# SPDX-License-Identifier: Apache-2.0
"""Ports, connections, doorbells, interrupts of other partitions: layouts and numbers (``include/hyperv/hvhdk.h``)."""

from __future__ import annotations

from .layout import Layout

# hv_port_type
PORT_MESSAGE = 1
PORT_EVENT = 2
PORT_MONITOR = 3
PORT_DOORBELL = 4

#: Port and connection ids have 24 bits; the rest is reserved.
ID_MASK = 0x00FF_FFFF
ANY_VP = 0xFFFF_FFFF

# flags of a doorbell's connection
DOORBELL_SIZE_MASK = 0x7  # 0 any, 1 byte, 2 word, 3 dword, 4 qword
DOORBELL_SIZE_MAX = 4
DOORBELL_ANY_VALUE = 0x8000_0000

#: ``port_info`` is a type and 16 bytes that depend on it: see the *_PORT layouts.
CREATE_PORT_INPUT = Layout(
    "hv_input_create_port", 56,
    "port_partition_id:Q", "port_id:I", "port_vtl:B", "min_connection_vtl:B", "_:2x", "connection_partition_id:Q",
    "port_type:I", "_:4x", "port_info:16s", "proximity_domain_info:Q",
)  # fmt: skip
#: Message and doorbell ports.
MESSAGE_PORT = Layout("hv_port_info.message_port_info", 16, "target_sint:I", "target_vp:I", "rsvdz:Q")
EVENT_PORT = Layout(
    "hv_port_info.event_port_info", 16,
    "target_sint:I", "target_vp:I", "base_flag_number:H", "flag_count:H", "rsvdz:I",
)  # fmt: skip
#: The doorbell's GPA, trigger value and flags; message and event connections have only zeros there.
CONNECT_PORT_INPUT = Layout(
    "hv_input_connect_port", 72,
    "connection_partition_id:Q", "connection_id:I", "connection_vtl:B", "rsvdz:3s", "port_partition_id:Q",
    "port_id:I", "_:4x", "port_type:I", "_:4x", "gpa:Q", "trigger_value:Q", "flags:Q", "proximity_domain_info:Q",
)  # fmt: skip
DISCONNECT_PORT_INPUT = Layout(
    "hv_input_disconnect_port", 16, "connection_partition_id:Q", "connection_id:I", "flags:I"
)
DISCONNECT_DOORBELL = 1
DELETE_PORT_INPUT = Layout("hv_input_delete_port", 16, "port_partition_id:Q", "port_id:I", "_:4x")
NOTIFY_PORT_RING_EMPTY_INPUT = Layout("hv_input_notify_port_ring_empty", 8, "sint_index:I", "_:4x")

POST_MESSAGE_INPUT = Layout(
    "hv_input_post_message",
    256,
    "connection_id:I",
    "_:4x",
    "message_type:I",
    "payload_size:I",
    "payload:240s",
)
SIGNAL_EVENT_INPUT = Layout("hv_input_signal_event", 8, "connection_id:I", "flag_number:H", "_:2x")
SIGNAL_EVENT_DIRECT_INPUT = Layout(
    "hv_input_signal_event_direct",
    16,
    "partition_id:Q",
    "vp_index:I",
    "target_vtl:B",
    "sint:B",
    "flag_number:H",
)
SIGNAL_EVENT_DIRECT_OUTPUT = Layout("hv_output_signal_event_direct", 8, "newly_signaled:B", "_:7x")
#: The message is a whole slot: header and payload.
POST_MESSAGE_DIRECT_INPUT = Layout(
    "hv_input_post_message_direct", 280,
    "partition_id:Q", "vp_index:I", "target_vtl:B", "_:3x", "sint:I", "message:256s", "_:4x",
)  # fmt: skip

ASSERT_VIRTUAL_INTERRUPT_INPUT = Layout(
    "hv_input_assert_virtual_interrupt", 32,
    "partition_id:Q", "interrupt_type:I", "control:I", "destination:Q", "vector:I", "target_vtl:B", "_:3x",
)  # fmt: skip
CLEAR_VIRTUAL_INTERRUPT_INPUT = Layout("hv_input_clear_virtual_interrupt", 8, "partition_id:Q")

# hv_interrupt_type
INTERRUPT_FIXED = 0
INTERRUPT_LOWEST_PRIORITY = 1
INTERRUPT_SMI = 2
INTERRUPT_REMOTE_READ = 3
INTERRUPT_NMI = 4
INTERRUPT_INIT = 5
INTERRUPT_SIPI = 6
INTERRUPT_EXTINT = 7
INTERRUPT_LINT0 = 8
INTERRUPT_LINT1 = 9
# hv_interrupt_control above the type; rust-vmm also sets "long mode" (bit 30)
INTERRUPT_LEVEL = 1
INTERRUPT_LOGICAL = 2
