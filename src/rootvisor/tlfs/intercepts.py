# SPDX-License-Identifier: Apache-2.0
"""Intercepts: message types and payloads, what can be installed (``include/hyperv/hvgdk_mini.h``, ``hvhdk.h``)."""

from __future__ import annotations

from .layout import Layout

# --- hv_message_type ----------------------------------------------------------------------------------------------
UNMAPPED_GPA = 0x80000000
GPA_INTERCEPT = 0x80000001
INVALID_VP_REGISTER_VALUE = 0x80000020
UNRECOVERABLE_EXCEPTION = 0x80000021
UNSUPPORTED_FEATURE = 0x80000022
HYPERCALL_INTERCEPT = 0x80000050
SYNIC_SINT_INTERCEPT = 0x80000061
SYNIC_SINT_DELIVERABLE = 0x80000062
X64_IO_PORT_INTERCEPT = 0x80010000
X64_MSR_INTERCEPT = 0x80010001
X64_CPUID_INTERCEPT = 0x80010002
X64_EXCEPTION_INTERCEPT = 0x80010003
X64_APIC_EOI = 0x80010004
X64_HALT = 0x80010007
X64_INTERRUPTION_DELIVERABLE = 0x80010008
X64_SIPI_INTERCEPT = 0x80010009

# --- hv_intercept_access_type -------------------------------------------------------------------------------------
ACCESS_READ = 0
ACCESS_WRITE = 1
ACCESS_EXECUTE = 2

#: Access mask of HVCALL_INSTALL_INTERCEPT: one bit per access type.
MASK_READ = 1
MASK_WRITE = 2
MASK_EXECUTE = 4

# --- hv_intercept_type --------------------------------------------------------------------------------------------
TYPE_IO_PORT = 0x0
TYPE_MSR = 0x1
TYPE_CPUID = 0x2
TYPE_EXCEPTION = 0x3
TYPE_REGISTER = 0x4
TYPE_MMIO = 0x5
TYPE_GLOBAL_CPUID = 0x6
TYPE_APIC_SMI = 0x7
TYPE_HYPERCALL = 0x8
TYPE_APIC_INIT_SIPI = 0x9
TYPE_MC_UPDATE_PATCH_LEVEL = 0xA
TYPE_APIC_WRITE = 0xB
TYPE_MSR_INDEX = 0xC
TYPE_UNKNOWN_SYNIC_CONNECTION = 0xD
TYPE_APIC_EOI = 0xE
TYPE_RETARGET_WITH_UNKNOWN_DEVICE_ID = 0xF
TYPE_IO_PORT_RANGE = 0x11

INSTALL_INTERCEPT_INPUT = Layout(
    "hv_input_install_intercept", 24, "partition_id:Q", "access_mask:I", "intercept_type:I", "parameter:Q"
)

# --- hv_x64_vp_execution_state ------------------------------------------------------------------------------------
STATE_CPL = 3
STATE_CR0_PE = 1 << 2
STATE_CR0_AM = 1 << 3
STATE_EFER_LMA = 1 << 4
STATE_DEBUG_ACTIVE = 1 << 5
STATE_INTERRUPTION_PENDING = 1 << 6
STATE_INTERRUPT_SHADOW = 1 << 12

#: ``cr8_and_length`` is the instruction length in bits 3:0 and CR8 in 7:4.
_HEADER = (
    "vp_index:I", "cr8_and_length:B", "access_type:B", "execution_state:H",
    "cs_base:Q", "cs_limit:I", "cs_selector:H", "cs_attributes:H", "rip:Q", "rflags:Q",
)  # fmt: skip
_SEGMENT = ("_base:Q", "_limit:I", "_selector:H", "_attributes:H")

INTERCEPT_HEADER = Layout("hv_x64_intercept_message_header", 40, *_HEADER)

#: ``info``: GVA valid, GVA belongs to GPA.
MEMORY_GVA_VALID = 1
MEMORY_GVA_GPA_VALID = 2
MEMORY_INTERCEPT = Layout(
    "hv_x64_memory_intercept_message", 80, *_HEADER,
    "cache_type:I", "byte_count:B", "info:B", "tpr_priority:B", "_:1x", "gva:Q", "gpa:Q", "bytes:16s",
)  # fmt: skip

#: ``info``: access size in bits 2:0.
IO_STRING = 1 << 3
IO_REP = 1 << 4
IO_PORT_INTERCEPT = Layout(
    "hv_x64_io_port_intercept_message", 128, *_HEADER,
    "port:H", "info:B", "byte_count:B", "_:4x", "rax:Q", "bytes:16s",
    *(f"ds{part}" for part in _SEGMENT), *(f"es{part}" for part in _SEGMENT),
    "rcx:Q", "rsi:Q", "rdi:Q",
)  # fmt: skip

MSR_INTERCEPT = Layout("hv_x64_msr_intercept_message", 64, *_HEADER, "msr_number:I", "_:4x", "rdx:Q", "rax:Q")

EXCEPTION_ERROR_CODE_VALID = 1
EXCEPTION_SOFTWARE = 2
EXCEPTION_INTERCEPT = Layout(
    "hv_x64_exception_intercept_message", 240, *_HEADER,
    "vector:H", "info:B", "byte_count:B", "error_code:I", "parameter:Q", "_:8x", "bytes:16s",
    *(f"ds{part}" for part in _SEGMENT), *(f"ss{part}" for part in _SEGMENT),
    *(f"{name}:Q" for name in ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")),
    *(f"r{number}:Q" for number in range(8, 16)),
)  # fmt: skip

HYPERCALL_INTERCEPT_MESSAGE = Layout(
    "hv_x64_hypercall_intercept_message", 200, *_HEADER,
    *(f"{name}:Q" for name in ("rax", "rbx", "rcx", "rdx", "r8", "rsi", "rdi")),
    "xmm:96s", "flags:Q",
)  # fmt: skip

#: No header: the VP that wrote EOI, and the vector.
APIC_EOI_MESSAGE = Layout("hv_x64_apic_eoi_message", 8, "vp_index:I", "vector:I")
INVALID_VP_REGISTER_MESSAGE = Layout("hv_x64_invalid_vp_register_message", 8, "vp_index:I", "_:4x")

# --- HVCALL_DISPATCH_VP -------------------------------------------------------------------------------------------
DISPATCH_VP_INPUT = Layout(
    "hv_input_dispatch_vp", 32, "partition_id:Q", "vp_index:I", "flags:I", "time_slice:Q", "spec_ctrl:Q"
)
DISPATCH_VP_OUTPUT = Layout("hv_output_dispatch_vp", 8, "dispatch_state:I", "dispatch_event:I")
DISPATCH_CLEAR_INTERCEPT_SUSPEND = 1 << 0
DISPATCH_SCAN_INTERRUPT_INJECTION = 1 << 6
DISPATCH_STATE_BLOCKED = 1
DISPATCH_STATE_READY = 2
DISPATCH_EVENT_OTHER = 0
DISPATCH_EVENT_SUSPEND = 1
DISPATCH_EVENT_INTERCEPT = 2
