# SPDX-License-Identifier: Apache-2.0
"""A virtual processor: one thread in KVM_RUN, and what each exit means."""

from __future__ import annotations

from _thread import allocate_lock, get_ident
from fcntl import ioctl
from time import pthread_getcpuclockid

from ..kvm import abi
from ..kvm.errors import KvmError, ioctl_error
from ..kvm.vm import msi_message
from . import hypercall_abi
from .address_space import write_access
from .errors import GeneralProtection, HypervisorError, UndefinedOpcode
from .interrupt_remapping import MSI_BASE
from .synic import Synic
from .synthetic_msrs import synthetic_msrs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..kvm.vcpu import Vcpu
    from ..trace.sink import Sink
    from .partition import Partition

_UNDEFINED_OPCODE = 6
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
        "lp_index",
        "operand_pages",
        "partition",
        "stopping",
        "synic",
        "trace",
        "u8",
        "u64",
        "vcpu",
    )  # fmt: skip

    def __init__(self, partition: Partition, index: int, vcpu: Vcpu) -> None:
        self.partition = partition
        self.index = index
        self.vcpu = vcpu
        self.apic_id = vcpu.index
        self.lp_index = index
        #: CREATE_VP has announced it (VP 0 exists from the start)
        self.created = index == 0
        self.trace: Sink | None = None
        self.exits = [0] * 64
        self.hypercalls: dict[int, int] = {}
        self.interrupts = 0
        self.stopping = False
        self.finished = allocate_lock()
        self.deadline = 0
        self.call_input = memoryview(b"")
        self.u8 = vcpu.u8
        self.u64 = vcpu.u64
        #: pages that hypercall operands lie in, by page number
        self.operand_pages: dict[int, memoryview] = {}
        self.cpu_clock = 0
        pages = partition.owned_pages
        self.assist_page = pages.allocate()
        simp, siefp, sirbp = pages.allocate(), pages.allocate(), pages.allocate()
        self.synic = Synic(simp, siefp, sirbp, self.interrupt)
        self._msrs = synthetic_msrs(self)
        vcpu.u64[abi.RUN_VALID_REGS // 8] = abi.SYNC_REGS | abi.SYNC_SREGS

    def interrupt(self, vector: int) -> None:
        """Delivers a fixed, edge-triggered interrupt to this VP's local APIC."""
        self.interrupts += 1
        self.partition.vm.signal_msi(msi_message(MSI_BASE | self.apic_id << 12, vector))

    # --- the thread -----------------------------------------------------------------------------------------------
    def thread(self) -> None:
        """Body of the VP's thread: runs until the partition ends, then lets go of ``finished``."""
        self.vcpu.thread = get_ident()
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
        vcpu = self.vcpu
        u8, u16, u32, u64 = vcpu.u8, vcpu.u16, vcpu.u32, vcpu.u64
        fd = vcpu.fd
        run = abi.KVM_RUN
        exits = self.exits
        ports = self.partition.ports
        writes = ports.writes
        mmio = self.partition.mmio
        execute = hypercall_abi.execute
        hypercall_access = write_access(hypercall_abi.PORT, 4)
        coalesced = self.partition.vm.coalesced
        # The ring's two heads as one word; without a ring padding, which never changes. The ring is empty as long as
        # the word is what it was after the last time it was emptied.
        ring = (coalesced.offset or abi.RUN_UNION + 248) // 8
        drained = 0
        readers = self._readers()
        while True:
            try:
                ioctl(fd, run)  # two arguments: a third costs 18 us (contract/kvm-mapping 1.1)
            except InterruptedError:
                if self.stopping:
                    return
                u8[1] = 0
                continue
            except BlockingIOError:
                continue  # an application processor woke up for INIT or SIPI
            except OSError as error:
                if self.stopping:
                    return
                raise self._run_failed(error) from error
            # Below, the frequent exits do few and always the same operations. What differs between exits costs more
            # than it looks, above all under emulation, where every world switch empties the emulator's caches.
            reason = u32[2]
            exits[reason] += 1
            if u64[ring] != drained:  # writes that did not exit come first
                coalesced.drain(ports.write, mmio.write)
                drained = u64[ring]
            # EXIT_IO: direction u8, size u8, port u16, count u32, data offset u64 (page aligned)
            if reason == 2:
                access = u64[4]
                if access == hypercall_access:
                    try:
                        execute(self)
                    except UndefinedOpcode:
                        self._inject_undefined_opcode()
                elif access in writes:
                    offset, size, write = writes[access]
                    at = u64[5]
                    write(offset, size, u8[at] if size == 1 else u16[at >> 1] if size == 2 else u32[at >> 2])
                else:
                    self._port_io(u16[17], u8[33])
            elif reason == 6:  # EXIT_MMIO: gpa u64, data[8], len u32, is_write u8
                size = u32[12]
                if u8[52]:
                    mmio.write(u64[4], size, int.from_bytes(u8[40 : 40 + size], "little"))
                else:
                    u8[40:48] = mmio.read(u64[4], size).to_bytes(8, "little")
            elif reason == 29:  # EXIT_X86_RDMSR: error u8 (cleared by KVM), reason u32, index u32, data u64
                msr = u32[11]
                if msr in readers:
                    try:
                        u64[6] = readers[msr]() & _MASK64
                    except (GeneralProtection, KvmError):
                        u8[32] = 1
                else:
                    self._read_msr(msr)
            elif reason == 30:
                self._write_msr(u32[11], u64[6])
            elif reason == abi.EXIT_SHUTDOWN:
                self.partition.end("triple-fault", self._where())
            elif reason != abi.EXIT_INTR:
                self._unexpected_exit(reason)
            # Who ended the partition in here has kicked this VP as well: KVM_RUN gives EINTR before the guest runs.

    def _port_io(self, port: int, size: int) -> None:
        """A port access that the loop does not know: reads, string I/O, ports without a device."""
        vcpu = self.vcpu
        u8 = vcpu.u8
        ports = self.partition.ports
        if port == hypercall_abi.PORT and u8[32]:  # an OUT of another size than the hypercall page's
            try:
                hypercall_abi.execute(self)
            except UndefinedOpcode:
                self._inject_undefined_opcode()
        elif vcpu.u32[9] != 1:
            self._string_io(port, size)
        else:
            at = vcpu.u64[5]
            if u8[32]:
                ports.write(port, size, int.from_bytes(u8[at : at + size], "little"))
            else:
                u8[at : at + size] = ports.read(port, size).to_bytes(size, "little")

    def _string_io(self, port: int, size: int) -> None:
        """INS/OUTS: KVM hands over several items at once."""
        u8 = self.vcpu.u8
        at = self.vcpu.u64[5]
        ports = self.partition.ports
        for _ in range(self.vcpu.u32[9]):
            if u8[32]:
                ports.write(port, size, int.from_bytes(u8[at : at + size], "little"))
            else:
                u8[at : at + size] = ports.read(port, size).to_bytes(size, "little")
            at += size

    def _readers(self) -> dict[int, Callable[[], int]]:
        """The MSRs that can be read, for the run loop; none while tracing, when :meth:`_read_msr` reports each."""
        if self.trace is not None:
            return {}
        return {number: accessors[0] for number, accessors in self._msrs.items() if accessors[0] is not None}

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

    # --- the rest -------------------------------------------------------------------------------------------------
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

    def _run_failed(self, error: OSError) -> Exception:
        if error.errno == 14:  # EFAULT: the memory behind a slot is gone or full
            return HypervisorError(
                f"VP {self.index} touched memory that the host cannot provide ({self._where()}); "
                "free memory on this machine or lower --memory"
            )
        return ioctl_error(abi.KVM_RUN, error)

    def _unexpected_exit(self, reason: int) -> None:
        u32 = self.vcpu.u32
        name = abi.EXIT_NAMES.get(reason, str(reason))
        if reason == abi.EXIT_INTERNAL_ERROR:
            name += f" (suberror {u32[8]})"
        elif reason == abi.EXIT_FAIL_ENTRY:
            name += f" (hardware reason {self.vcpu.u64[4]:#x})"
        raise HypervisorError(
            f"KVM stopped VP {self.index} with exit {name}, {self._where()}; see `rootvisor doctor`"
        )

    def stop(self) -> None:
        """Asks the thread to end; join by acquiring ``finished``."""
        self.stopping = True
        self.vcpu.kick()
