# SPDX-License-Identifier: Apache-2.0
"""What every partition has: an id, privileges, memory, VPs, clocks, a pool of deposited pages, and an end."""

from __future__ import annotations

from _thread import allocate_lock

from ..tlfs import cpuid, status
from .deposits import DepositPool
from .errors import HvError
from .reference_time import ReferenceTime

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..bus.address_space import GuestMemory
    from ..kvm.vm import Vm
    from ..trace.sink import Sink
    from .hypercall_table import Hypercall
    from .hypervisor import Hypervisor
    from .overlay import OverlayPage
    from .vp import VirtualProcessor

#: KVM's local APIC timer counts nanoseconds.
APIC_HZ = 1_000_000_000


class Partition:
    """The parts that hypercalls, synthetic MSRs and CPUID need; a root or a child adds its own.

    ``privileges`` and ``features`` are CPUID 0x40000003 (EBX:EAX and EDX), ``recommendations`` 0x40000004 EAX.
    """

    __slots__ = (
        "_end_lock", "apic_hz", "calls", "crash_parameters", "crash_report", "defect", "deposits", "detail", "ended",
        "features", "guest_os_id", "hypercall_page", "hypervisor", "hypervisor_present", "id", "last_leaf", "max_vps",
        "memory", "privileges", "recommendations", "reference_time", "trace", "tsc_invariant",
        "tsc_page", "vm", "vps",
    )  # fmt: skip
    reference_time: ReferenceTime

    def __init__(self, hypervisor: Hypervisor, partition_id: int, memory: GuestMemory, vm: Vm) -> None:
        self.hypervisor = hypervisor
        self.id = partition_id
        self.privileges = 0
        self.features = 0
        self.recommendations = 0
        #: whether CPUID tells of a hypervisor, and of the interface "Hv#1"
        self.hypervisor_present = True
        #: the highest hypervisor leaf
        self.last_leaf = cpuid.ISOLATION
        #: how many VPs there can be (CPUID 0x40000005)
        self.max_vps = hypervisor.max_vps
        self.memory = memory
        self.vm = vm
        self.deposits = DepositPool()
        self.hypercall_page: OverlayPage
        self.tsc_page: OverlayPage
        #: in the order of their indices; see :meth:`vp`
        self.vps: list[VirtualProcessor] = []
        self.reference_time = ReferenceTime(1_000_000_000, 0)
        self.apic_hz = APIC_HZ
        self.guest_os_id = 0
        self.tsc_invariant = 0
        self.crash_parameters = [0] * 5
        self.crash_report = b""
        #: calls beside those of every partition
        self.calls: dict[int, Hypercall] | None = None
        self.trace: Sink | None = None
        #: how it ended ("poweroff", "reset", "crash", "triple-fault", "host-error", ...), "" while it runs
        self.ended = ""
        self.detail = ""
        self.defect: BaseException | None = None
        self._end_lock = allocate_lock()

    def vp(self, index: int) -> VirtualProcessor:
        """The VP with that index. HV_STATUS_INVALID_VP_INDEX."""
        if index < len(self.vps):
            return self.vps[index]
        raise HvError(status.INVALID_VP_INDEX)

    def vp_by_apic_id(self, apic_id: int) -> VirtualProcessor | None:
        """The VP with that APIC id."""
        for vp in self.vps:
            if vp.apic_id == apic_id:
                return vp
        return None

    def end(self, how: str, detail: str = "") -> None:
        """Records how the partition ended (the first one counts) and lets its kind do the rest (:meth:`stopping`)."""
        with self._end_lock:
            if self.ended:
                return
            self.ended = how
            self.detail = detail
        self.stopping()

    def stopping(self) -> None:
        """What the end of this kind of partition means; called once."""
        raise NotImplementedError

    def end_with_defect(self, error: BaseException) -> None:
        """A defect of the hypervisor's own: the run ends with its traceback at hand."""
        self.defect = error
        self.end("host-error", f"internal error: {type(error).__name__}: {error}")

    def crash(self, message: bytes) -> None:
        """The partition reported a crash through the crash MSRs; ``message`` is its text, if it gave one."""
        self.crash_report = message
        if self.trace is not None:
            self.trace.event("crash", message.decode("utf-8", "replace"))
        self.end("crash", " ".join(f"P{n}={value:#x}" for n, value in enumerate(self.crash_parameters)))

    def close(self) -> None:
        """Frees the KVM machine; all threads have ended."""
        self.vm.close()
