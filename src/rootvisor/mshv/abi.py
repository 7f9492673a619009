# SPDX-License-Identifier: Apache-2.0
"""/dev/mshv itself: ioctl numbers, argument layouts and limits (Linux >= 6.15: ``include/uapi/linux/mshv.h``)."""

from __future__ import annotations

from rootvisor.tlfs.layout import Layout

PAGE = 4096

# --- ioctl numbers ------------------------------------------------------------------------------------------------
# of /dev/mshv
CREATE_PARTITION = 0x4010B800
# of a partition
INITIALIZE_PARTITION = 0x0000B800
CREATE_VP = 0x4004B801
SET_GUEST_MEMORY = 0x4020B802
IRQFD = 0x4010B803
IOEVENTFD = 0x4020B804
SET_MSI_ROUTING = 0x4008B805
GET_GPAP_ACCESS_BITMAP = 0xC020B806
# of a VP
RUN_VP = 0x8100B800
GET_VP_STATE = 0xC010B801
SET_VP_STATE = 0xC010B802
# of all three
ROOT_HVCALL = 0xC020B807

#: Number -> name, as messages of errors show it.
NAMES = {
    CREATE_PARTITION: "MSHV_CREATE_PARTITION",
    INITIALIZE_PARTITION: "MSHV_INITIALIZE_PARTITION",
    CREATE_VP: "MSHV_CREATE_VP",
    SET_GUEST_MEMORY: "MSHV_SET_GUEST_MEMORY",
    IRQFD: "MSHV_IRQFD",
    IOEVENTFD: "MSHV_IOEVENTFD",
    SET_MSI_ROUTING: "MSHV_SET_MSI_ROUTING",
    GET_GPAP_ACCESS_BITMAP: "MSHV_GET_GPAP_ACCESS_BITMAP",
    RUN_VP: "MSHV_RUN_VP",
    GET_VP_STATE: "MSHV_GET_VP_STATE",
    SET_VP_STATE: "MSHV_SET_VP_STATE",
    ROOT_HVCALL: "MSHV_ROOT_HVCALL",
}

# --- layouts ------------------------------------------------------------------------------------------------------
CREATE_PARTITION_V1 = Layout("mshv_create_partition", 16, "pt_flags:Q", "pt_isolation:Q")
CREATE_PARTITION_V2 = Layout(
    "mshv_create_partition_v2", 64,
    "pt_flags:Q", "pt_isolation:Q", "pt_num_cpu_fbanks:H", "_:6x", "pt_cpu_fbanks0:Q", "pt_cpu_fbanks1:Q", "_:16x",
    "pt_disabled_xsave:Q",
)  # fmt: skip
CREATE_VP_ARGUMENT = Layout("mshv_create_vp", 4, "vp_index:I")
USER_MEM_REGION = Layout(
    "mshv_user_mem_region", 32, "size:Q", "guest_pfn:Q", "userspace_addr:Q", "flags:B", "_:7x"
)
USER_IRQFD = Layout("mshv_user_irqfd", 16, "fd:i", "resamplefd:i", "gsi:I", "flags:I")
USER_IOEVENTFD = Layout(
    "mshv_user_ioeventfd", 32, "datamatch:Q", "addr:Q", "len:I", "fd:i", "flags:I", "_:4x"
)
USER_IRQ_TABLE = Layout("mshv_user_irq_table", 8, "nr:I", "_:4x")
USER_IRQ_ENTRY = Layout("mshv_user_irq_entry", 16, "gsi:I", "address_lo:I", "address_hi:I", "data:I")
GPAP_ACCESS_BITMAP = Layout(
    "mshv_gpap_access_bitmap", 32,
    "access_type:B", "access_op:B", "_:6x", "page_count:Q", "gpap_base:Q", "bitmap_ptr:Q",
)  # fmt: skip
ROOT_HVCALL_ARGUMENT = Layout(
    "mshv_root_hvcall", 32,
    "code:H", "reps:H", "in_sz:H", "out_sz:H", "status:H", "_:6x", "in_ptr:Q", "out_ptr:Q",
)  # fmt: skip
VP_STATE_ARGUMENT = Layout("mshv_get_set_vp_state", 16, "type:B", "_:3x", "buf_sz:I", "buf_ptr:Q")
MESSAGE_SIZE = 256

# --- flags --------------------------------------------------------------------------------------------------------
# pt_flags
PT_LAPIC = 1 << 0
PT_X2APIC = 1 << 1
PT_GPA_SUPER_PAGES = 1 << 2
PT_CPU_AND_XSAVE_FEATURES = 1 << 3
PT_NESTED_VIRTUALIZATION = 1 << 4
PT_SMT_ENABLED_GUEST = 1 << 5
CPU_FEATURES_BANKS = 2

SET_MEM_WRITABLE = 1 << 0
SET_MEM_EXECUTABLE = 1 << 1
SET_MEM_UNMAP = 1 << 2

IRQFD_DEASSIGN = 1 << 0
IRQFD_RESAMPLE = 1 << 1

IOEVENTFD_DATAMATCH = 1 << 0
IOEVENTFD_PIO = 1 << 1
IOEVENTFD_DEASSIGN = 1 << 2

ACCESS_TYPE_ACCESSED = 0
ACCESS_TYPE_DIRTY = 1
ACCESS_OP_NOOP = 0
ACCESS_OP_CLEAR = 1
ACCESS_OP_SET = 2

MMAP_REGISTERS = 0
MMAP_INTERCEPT_MESSAGE = 1

#: VP indexes and interrupt numbers are smaller (``drivers/hv/mshv_root.h``).
MAX_VPS = 256
MAX_GUEST_IRQS = 4096
