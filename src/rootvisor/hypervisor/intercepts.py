# SPDX-License-Identifier: Apache-2.0
"""Intercept messages of a child VP (layouts in :mod:`rootvisor.tlfs.intercepts`), and which intercepts are installed.

The functions build payloads from the VP's shared run page; they run on the VP's own thread with ``Hypervisor.lock``
held. A message always shows the VP as it is before the intercepted instruction.
"""

from __future__ import annotations

from struct import Struct

from ..kvm import abi
from ..kvm.vcpu import FPU_XMM
from ..tlfs import hypercalls, status
from ..tlfs import intercepts as tlfs
from .errors import HvError
from .segments import pack_user_segments

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .child_vp import ChildVp

_REGS = abi.RUN_SYNC // 8
_RAX, _RBX, _RCX, _RDX, _RSI, _RDI, _RSP, _RBP, _R8 = range(_REGS, _REGS + 9)
_RIP = _REGS + 16
_RFLAGS = _REGS + 17
_SREGS = _REGS + 18
_SS = _SREGS + abi.SREGS_SS // 8
_CR0 = _SREGS + abi.SREGS_CR0 // 8
_CR8 = _SREGS + abi.SREGS_CR8 // 8
_EFER = _SREGS + abi.SREGS_EFER // 8
_EVENTS = abi.SYNC_EVENTS_AT // 8

_CR0_AM = 1 << 18
_EFER_LMA = 1 << 10
#: First word of kvm_vcpu_events: an exception is injected, or pending.
_EXCEPTION_ACTIVE = 0x0000_0000_FF00_00FF

#: The header with its segment as one piece, at the offsets of tlfs.INTERCEPT_HEADER. A pack with many small fields is
#: slow, and segments are the same most of the time.
_HEADER = "IBBH16sQQ"
_PLAIN = Struct("<" + _HEADER)
_IO = Struct("<" + _HEADER + "HBB4xQ16s16s16sQQQ")
_MEMORY = Struct("<" + _HEADER + "IBBBxQQ16s")
_MSR = Struct("<" + _HEADER + "I4xQQ")
_EXCEPTION = Struct("<" + _HEADER + "HBBIQ8x16s16s16s16Q")
_HYPERCALL = Struct("<" + _HEADER + "7Q96sQ")
#: In what pack_user_segments gives.
_ES_PART, _CS_PART, _SS_PART, _DS_PART = (slice(at, at + 16) for at in range(0, 64, 16))


def header(
    vp: ChildVp, length: int, access: int, segments: bytes
) -> tuple[int, int, int, int, bytes, int, int]:
    """The fields of hv_x64_intercept_message_header; ``length`` is the instruction's, 0 if not known."""
    u64 = vp.u64
    cr0 = u64[_CR0]
    state = u64[_SS + 2] & 3 | (cr0 & 1) << 2
    if cr0 & _CR0_AM:
        state |= tlfs.STATE_CR0_AM
    if u64[_EFER] & _EFER_LMA:
        state |= tlfs.STATE_EFER_LMA
    event = u64[_EVENTS + 1]  # interrupt: injected, nr, soft, shadow; NMI: injected, pending, masked
    if event & 0xFF00_0000:
        state |= tlfs.STATE_INTERRUPT_SHADOW
    if event & 0xFF_0000_00FF or u64[_EVENTS] & _EXCEPTION_ACTIVE:
        state |= tlfs.STATE_INTERRUPTION_PENDING
    return (
        vp.index,
        length | (u64[_CR8] & 0xF) << 4,
        access,
        state,
        segments[_CS_PART],
        u64[_RIP],
        u64[_RFLAGS],
    )


def io_port(vp: ChildVp, port: int, write: bool, info: int, length: int, code: bytes) -> bytes:
    """HVMSG_X64_IO_PORT_INTERCEPT; ``info`` is size, string and rep."""
    u64 = vp.u64
    segments = pack_user_segments(vp.u8)
    return _IO.pack(
        *header(vp, length, tlfs.ACCESS_WRITE if write else tlfs.ACCESS_READ, segments),
        port, info, len(code), u64[_RAX], code, segments[_DS_PART], segments[_ES_PART],
        u64[_RCX], u64[_RSI], u64[_RDI],
    )  # fmt: skip


def memory(vp: ChildVp, access: int, info: int, gva: int, gpa: int, length: int, code: bytes) -> bytes:
    """HVMSG_UNMAPPED_GPA and HVMSG_GPA_INTERCEPT."""
    return _MEMORY.pack(
        *header(vp, length, access, pack_user_segments(vp.u8)),
        0, len(code), info, vp.u64[_CR8] & 0xF, gva, gpa, code,
    )  # fmt: skip


def msr(vp: ChildVp, number: int, write: bool) -> bytes:
    """HVMSG_X64_MSR_INTERCEPT. RDMSR and WRMSR are two bytes long."""
    access = tlfs.ACCESS_WRITE if write else tlfs.ACCESS_READ
    return _MSR.pack(*header(vp, 2, access, pack_user_segments(vp.u8)), number, vp.u64[_RDX], vp.u64[_RAX])


def exception(vp: ChildVp, vector: int, parameter: int, software: bool, length: int, code: bytes) -> bytes:
    """HVMSG_X64_EXCEPTION_INTERCEPT of an exception without error code; ``parameter`` is DR6 for #DB."""
    u64 = vp.u64
    segments = pack_user_segments(vp.u8)
    return _EXCEPTION.pack(
        *header(vp, length, tlfs.ACCESS_EXECUTE, segments),
        vector, tlfs.EXCEPTION_SOFTWARE if software else 0, len(code), 0, parameter, code,
        segments[_DS_PART], segments[_SS_PART],
        u64[_RAX], u64[_RCX], u64[_RDX], u64[_RBX], u64[_RSP], u64[_RBP], u64[_RSI], u64[_RDI],
        *(u64[_R8 + number] for number in range(8)),
    )  # fmt: skip


def hypercall(vp: ChildVp) -> bytes:
    """HVMSG_HYPERCALL_INTERCEPT; the call's instruction is three bytes long, as VMCALL and VMMCALL are."""
    u64 = vp.u64
    xmm = vp.vcpu.fpu()[FPU_XMM : FPU_XMM + 96]
    return _HYPERCALL.pack(
        *header(vp, 3, tlfs.ACCESS_EXECUTE, pack_user_segments(vp.u8)),
        u64[_RAX], u64[_RBX], u64[_RCX], u64[_RDX], u64[_R8], u64[_RSI], u64[_RDI], bytes(xmm), 0,
    )  # fmt: skip


def plain(vp: ChildVp) -> bytes:
    """The header alone: HVMSG_UNRECOVERABLE_EXCEPTION."""
    return _PLAIN.pack(*header(vp, 0, tlfs.ACCESS_EXECUTE, pack_user_segments(vp.u8)))


def invalid_register(vp: ChildVp) -> bytes:
    """HVMSG_INVALID_VP_REGISTER_VALUE."""
    return tlfs.INVALID_VP_REGISTER_MESSAGE.pack(vp.index)


#: The exceptions that KVM hands over.
BREAKPOINT = 3
DEBUG = 1
_ALL_ACCESSES = tlfs.MASK_READ | tlfs.MASK_WRITE | tlfs.MASK_EXECUTE


class InstalledIntercepts:
    """What the root asked for with HVCALL_INSTALL_INTERCEPT. An access mask of 0 takes an intercept back.

    Every port and every GPA without memory intercepts anyway in the children that the mshv driver makes, CPUID never
    leaves the hypervisor, and EOIs of level-triggered vectors are told without asking: those are only recorded.
    """

    __slots__ = ("exceptions", "hypercalls", "msrs", "recorded", "unknown_connections", "unknown_devices",
                 "unknown_msrs")  # fmt: skip

    def __init__(self) -> None:
        #: (type, parameter) -> access mask, of everything that was installed
        self.recorded: dict[tuple[int, int], int] = {}
        #: exception vectors
        self.exceptions: frozenset[int] = frozenset()
        #: MSR number -> access mask
        self.msrs: dict[int, int] = {}
        #: access mask for MSRs that nobody implements
        self.unknown_msrs = 0
        self.hypercalls = False
        self.unknown_connections = False
        self.unknown_devices = False

    def install(self, access_mask: int, intercept_type: int, parameter: int) -> None:
        """HV_STATUS_INVALID_PARAMETER: no such type, access or parameter; FEATURE_UNAVAILABLE: KVM cannot."""
        if access_mask & ~_ALL_ACCESSES:
            raise HvError(status.INVALID_PARAMETER)
        installed = access_mask != 0
        if intercept_type == tlfs.TYPE_EXCEPTION:
            vector = parameter & 0xFFFF
            if vector > 31:
                raise HvError(status.INVALID_PARAMETER)
            if vector not in (BREAKPOINT, DEBUG):
                # KVM hands over no other exception; those two come from its support for debuggers.
                raise HvError(status.FEATURE_UNAVAILABLE)
            self.exceptions = self.exceptions | {vector} if installed else self.exceptions - {vector}
        elif intercept_type == tlfs.TYPE_MSR:
            self.unknown_msrs = access_mask
        elif intercept_type == tlfs.TYPE_MSR_INDEX:
            number = parameter & 0xFFFF_FFFF
            if 0x800 <= number < 0x900:  # x2APIC: KVM does not let go of them
                raise HvError(status.FEATURE_UNAVAILABLE)
            if installed:
                self.msrs[number] = access_mask
            else:
                self.msrs.pop(number, None)
        elif intercept_type == tlfs.TYPE_HYPERCALL:
            self.hypercalls = installed
        elif intercept_type == tlfs.TYPE_UNKNOWN_SYNIC_CONNECTION:
            self.unknown_connections = installed
        elif intercept_type == tlfs.TYPE_RETARGET_WITH_UNKNOWN_DEVICE_ID:
            self.unknown_devices = installed
        elif intercept_type not in _RECORDED:
            raise HvError(
                status.FEATURE_UNAVAILABLE if intercept_type in _UNAVAILABLE else status.INVALID_PARAMETER
            )
        if installed:
            self.recorded[intercept_type, parameter] = access_mask
        else:
            self.recorded.pop((intercept_type, parameter), None)

    @property
    def any_hypercall(self) -> bool:
        """Whether some hypercalls of the child go to the root."""
        return self.hypercalls or self.unknown_connections or self.unknown_devices

    def wants(self, code: int, result: int) -> bool:
        """Whether a hypercall that came to ``result`` here is the root's."""
        if result == status.INVALID_HYPERCALL_CODE:
            return self.hypercalls
        if result == status.INVALID_CONNECTION_ID:
            return self.unknown_connections and code in (hypercalls.POST_MESSAGE, hypercalls.SIGNAL_EVENT)
        if result == status.INVALID_DEVICE_ID:
            return self.unknown_devices and code == hypercalls.RETARGET_DEVICE_INTERRUPT
        return False


_RECORDED = (
    tlfs.TYPE_IO_PORT,
    tlfs.TYPE_IO_PORT_RANGE,
    tlfs.TYPE_CPUID,
    tlfs.TYPE_GLOBAL_CPUID,
    tlfs.TYPE_APIC_EOI,
)
#: The local APIC lives in KVM: INIT, SIPI, SMI and register writes never leave it.
_UNAVAILABLE = (
    tlfs.TYPE_REGISTER,
    tlfs.TYPE_MMIO,
    tlfs.TYPE_APIC_SMI,
    tlfs.TYPE_APIC_INIT_SIPI,
    tlfs.TYPE_MC_UPDATE_PATCH_LEVEL,
    tlfs.TYPE_APIC_WRITE,
)
