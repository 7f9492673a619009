# SPDX-License-Identifier: Apache-2.0
"""A virtual processor, as hypercalls, synthetic MSRs and interrupts see it: what root and child VPs have in common."""

from __future__ import annotations

from _thread import allocate_lock, get_ident, get_native_id
from time import pthread_getcpuclockid

from ..bus.address_space import AddressError
from ..kvm import abi
from ..kvm.errors import KvmError
from ..kvm.vm import msi_message
from ..tlfs import status
from .errors import GeneralProtection, HvError, HypervisorError
from .interrupt_remapping import MSI_BASE
from .synic import Synic
from .synthetic_msrs import synthetic_msrs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _thread import LockType

    from ..kvm.vcpu import Vcpu
    from ..trace.sink import Sink
    from .overlay import OverlayPage
    from .partition import Partition
    from .synthetic_timers import SyntheticTimer

_UNDEFINED_OPCODE = 6
#: Pages of operands that a VP remembers.
_OPERAND_PAGES = 8
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF


class VirtualProcessor:
    """VP ``index`` of a partition, on a KVM processor with the same APIC id.

    ``exits`` counts by KVM exit reason, ``hypercalls`` by code.
    """

    __slots__ = (
        "_msrs",
        "apic_id",
        "assist_page",
        "call_input",
        "cpu_clock",
        "created",
        "deadline",
        "exits",
        "finished",
        "hypercalls",
        "index",
        "interrupts",
        "operand_pages",
        "partition",
        "stopping",
        "synic",
        "thread_id",
        "timers",
        "trace",
        "u8",
        "u64",
        "vcpu",
        "waking",
    )  # fmt: skip

    def __init__(self, partition: Partition, index: int, vcpu: Vcpu, pages: tuple[OverlayPage, ...]) -> None:
        """``pages`` are the VP's assist page, SIMP, SIEFP and SIRBP."""
        self.partition = partition
        self.index = index
        self.vcpu = vcpu
        self.apic_id = vcpu.index
        #: CREATE_VP has announced it (VP 0 exists from the start)
        self.created = index == 0
        self.trace: Sink | None = None
        self.exits = [0] * 64
        self.hypercalls: dict[int, int] = {}
        self.interrupts = 0
        self.stopping = False
        #: locks of threads to wake when its present exit is done; the interpreter is theirs then
        self.waking: list[LockType] = []
        self.finished = allocate_lock()
        self.deadline = 0
        self.call_input = memoryview(b"")
        self.u8 = vcpu.u8
        self.u64 = vcpu.u64
        #: pages that hypercall operands lie in, by page number
        self.operand_pages: dict[int, memoryview] = {}
        self.cpu_clock = 0
        #: the kernel's id of its thread, 0 before it runs
        self.thread_id = 0
        self.assist_page, simp, siefp, sirbp = pages
        self.synic = Synic(simp, siefp, sirbp, self.interrupt)
        #: those with synthetic timers bring them
        self.timers: tuple[SyntheticTimer, ...] = ()
        self._msrs = synthetic_msrs(self)
        vcpu.u64[abi.RUN_VALID_REGS // 8] = abi.SYNC_REGS | abi.SYNC_SREGS

    def interrupt(self, vector: int) -> None:
        """Delivers a fixed, edge-triggered interrupt to this VP's local APIC."""
        self.interrupts += 1
        self.partition.vm.signal_msi(msi_message(MSI_BASE | self.apic_id << 12, vector))

    def operand_page(self, gpn: int, write: bool) -> memoryview:
        """The page ``gpn``, for hypercall operands that are read, or written. HV_STATUS_INVALID_ALIGNMENT.

        A kernel uses the same two pages of a VP again and again: they are remembered.
        """
        try:
            page = self.partition.memory.view(gpn << 12, 4096)
        except AddressError:
            raise HvError(status.INVALID_ALIGNMENT) from None
        if len(self.operand_pages) >= _OPERAND_PAGES:
            self.operand_pages.clear()
        self.operand_pages[gpn] = page
        return page

    def wake(self) -> None:
        """Lets go of the locks in :attr:`waking`."""
        for lock in self.waking:
            try:
                lock.release()
            except RuntimeError:
                pass  # the thread was ended meanwhile
        self.waking.clear()

    def settle(self, caller: VirtualProcessor) -> None:
        """``caller`` is about to send something to this VP, with Hypervisor.lock held."""

    def assist_page_changed(self) -> None:
        """VP_ASSIST_PAGE was written."""

    def idle(self) -> int:
        """Read of GUEST_IDLE, where it is offered: returns 0 when an interrupt is pending."""
        raise NotImplementedError

    # --- the thread -----------------------------------------------------------------------------------------------
    def thread(self) -> None:
        """Body of the VP's thread: runs until the partition ends, then lets go of ``finished``."""
        self.vcpu.thread = get_ident()
        self.thread_id = get_native_id()
        self.cpu_clock = pthread_getcpuclockid(get_ident())
        partition = self.partition
        try:
            self._run()
        except (KvmError, HypervisorError) as error:
            partition.end("host-error", str(error))
        except Exception as error:  # a defect of ours: the run ends with it, it is never swallowed
            partition.end_with_defect(error)
        finally:
            self.vcpu.thread = 0
            self.finished.release()

    def _run(self) -> None:
        """The run loop; returns when ``stopping`` is set."""
        raise NotImplementedError

    def stop(self) -> None:
        """Asks the thread to end; join by acquiring ``finished``."""
        self.stopping = True
        self.vcpu.kick()

    # --- MSRs -----------------------------------------------------------------------------------------------------
    def _read_msr(self, index: int) -> None:
        vcpu = self.vcpu
        accessors = self._msrs.get(index)
        if accessors is None or accessors[0] is None:
            vcpu.u8[32] = 1
        else:
            try:
                vcpu.u64[6] = accessors[0]() & _MASK64
                vcpu.u8[32] = 0
            except (GeneralProtection, KvmError):
                vcpu.u8[32] = 1
        if self.trace is not None:
            self.trace.msr(self.index, index, False, vcpu.u64[6], faulted=bool(vcpu.u8[32]))

    def _write_msr(self, index: int, value: int) -> None:
        vcpu = self.vcpu
        accessors = self._msrs.get(index)
        if accessors is None or accessors[1] is None:
            vcpu.u8[32] = 1
        else:
            try:
                accessors[1](value)
                vcpu.u8[32] = 0
            except (GeneralProtection, KvmError):
                vcpu.u8[32] = 1
        if self.trace is not None:
            self.trace.msr(self.index, index, True, value, faulted=bool(vcpu.u8[32]))

    def _inject_undefined_opcode(self) -> None:
        """#UD at the hypercall's OUT: let KVM finish the I/O, put RIP back, then inject."""
        vcpu = self.vcpu
        rip = vcpu.u64[(abi.RUN_SYNC >> 3) + 16]
        vcpu.finish_exit()
        vcpu.set_regs(rip=rip)
        vcpu.inject_exception(_UNDEFINED_OPCODE)

    def _where(self) -> str:
        regs = self.vcpu.get_regs()
        return f"VP {self.index} at RIP {regs[16]:#x}, RSP {regs[6]:#x}"
