# SPDX-License-Identifier: Apache-2.0
"""KVM's user-space interface as numbers (``include/uapi/linux/kvm.h`` and ``arch/x86/include/uapi/asm/kvm.h``).

``NAME = number`` for ioctls, capabilities and exit reasons; ``RUN_*`` are byte offsets into ``struct kvm_run``.
"""

from __future__ import annotations

# --- ioctls on /dev/kvm -------------------------------------------------------------------------------------------
KVM_GET_API_VERSION = 0xAE00
KVM_CREATE_VM = 0xAE01
KVM_CHECK_EXTENSION = 0xAE03
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_GET_SUPPORTED_CPUID = 0xC008AE05

# --- ioctls on a VM -----------------------------------------------------------------------------------------------
KVM_CREATE_VCPU = 0xAE41
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_CREATE_IRQCHIP = 0xAE60
KVM_IRQ_LINE = 0x4008AE61
KVM_GET_IRQCHIP = 0xC208AE62
KVM_SET_IRQCHIP = 0x8208AE63
KVM_SET_GSI_ROUTING = 0x4008AE6A
KVM_REGISTER_COALESCED_MMIO = 0x4010AE67
KVM_UNREGISTER_COALESCED_MMIO = 0x4010AE68
KVM_IRQFD = 0x4020AE76
KVM_CREATE_PIT2 = 0x4040AE77
KVM_IOEVENTFD = 0x4040AE79
KVM_ENABLE_CAP = 0x4068AEA3
KVM_SIGNAL_MSI = 0x4020AEA5
KVM_X86_SET_MSR_FILTER = 0x4188AEC6

# --- ioctls on a VCPU ---------------------------------------------------------------------------------------------
KVM_RUN = 0xAE80
KVM_GET_REGS = 0x8090AE81
KVM_SET_REGS = 0x4090AE82
KVM_GET_SREGS = 0x8138AE83
KVM_SET_SREGS = 0x4138AE84
KVM_TRANSLATE = 0xC018AE85
KVM_GET_MSRS = 0xC008AE88
KVM_SET_MSRS = 0x4008AE89
KVM_GET_FPU = 0x81A0AE8C
KVM_SET_FPU = 0x41A0AE8D
KVM_GET_LAPIC = 0x8400AE8E
KVM_SET_CPUID2 = 0x4008AE90
KVM_GET_MP_STATE = 0x8004AE98
KVM_SET_MP_STATE = 0x4004AE99
KVM_GET_VCPU_EVENTS = 0x8040AE9F
KVM_SET_VCPU_EVENTS = 0x4040AEA0
KVM_GET_TSC_KHZ = 0xAEA3
KVM_GET_XCRS = 0x8188AEA6

#: Names for error messages; the number is what an OSError handler has at hand.
IOCTL_NAMES = {
    value: name
    for name, value in list(globals().items())
    if name.startswith("KVM_") and isinstance(value, int)
}

# --- capabilities -------------------------------------------------------------------------------------------------
CAP_IRQCHIP = 0
CAP_USER_MEMORY = 3
CAP_NR_VCPUS = 9
CAP_COALESCED_MMIO = 15
CAP_IRQFD = 32
CAP_PIT2 = 33
CAP_IOEVENTFD = 36
CAP_GET_TSC_KHZ = 61
CAP_MAX_VCPUS = 66
CAP_SYNC_REGS = 74
CAP_SIGNAL_MSI = 77
CAP_READONLY_MEM = 81
CAP_IMMEDIATE_EXIT = 136
CAP_COALESCED_PIO = 162
CAP_X86_USER_SPACE_MSR = 188
CAP_X86_MSR_FILTER = 189

# --- exit reasons -------------------------------------------------------------------------------------------------
EXIT_UNKNOWN = 0
EXIT_IO = 2
EXIT_HYPERCALL = 3
EXIT_DEBUG = 4
EXIT_HLT = 5
EXIT_MMIO = 6
EXIT_IRQ_WINDOW_OPEN = 7
EXIT_SHUTDOWN = 8
EXIT_FAIL_ENTRY = 9
EXIT_INTR = 10
EXIT_INTERNAL_ERROR = 17
EXIT_SYSTEM_EVENT = 24
EXIT_IOAPIC_EOI = 26
EXIT_X86_RDMSR = 29
EXIT_X86_WRMSR = 30
EXIT_MEMORY_FAULT = 39
EXIT_NAMES = {value: name[5:].lower() for name, value in list(globals().items()) if name.startswith("EXIT_")}

# --- struct kvm_run -----------------------------------------------------------------------------------------------
RUN_IMMEDIATE_EXIT = 1
RUN_EXIT_REASON = 8
RUN_UNION = 32
RUN_VALID_REGS = 288
RUN_DIRTY_REGS = 296
RUN_SYNC = 304  # struct kvm_sync_regs: kvm_regs (144), kvm_sregs (312), kvm_vcpu_events (64)

SYNC_REGS = 1
SYNC_SREGS = 2
SYNC_EVENTS = 4

#: Index of each register in ``struct kvm_regs`` (18 u64).
REGS = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
        "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags")  # fmt: skip

# offsets inside struct kvm_sregs
SREGS_CS = 0
SREGS_SS = 120
SREGS_GDT = 192
SREGS_IDT = 208
SREGS_CR0 = 224
SREGS_CR2 = 232
SREGS_CR3 = 240
SREGS_CR4 = 248
SREGS_CR8 = 256
SREGS_EFER = 264
SREGS_APIC_BASE = 272
SEGMENT_SELECTOR = 12
SEGMENT_DPL = 16
SEGMENT_L = 19

MSR_EXIT_REASON_INVAL = 1
MSR_EXIT_REASON_UNKNOWN = 2
MSR_EXIT_REASON_FILTER = 4

MEM_LOG_DIRTY_PAGES = 1
MEM_READONLY = 2

MP_STATE_RUNNABLE = 0
MP_STATE_UNINITIALIZED = 1
MP_STATE_HALTED = 3

IOEVENTFD_DATAMATCH = 1
IOEVENTFD_PIO = 2
IOEVENTFD_DEASSIGN = 4
IRQFD_DEASSIGN = 1

ROUTING_IRQCHIP = 1
ROUTING_MSI = 2
IRQCHIP_PIC_MASTER = 0
IRQCHIP_PIC_SLAVE = 1
IRQCHIP_IOAPIC = 2

MSR_TSC = 0x10
MSR_MTRR_DEF_TYPE = 0x2FF
