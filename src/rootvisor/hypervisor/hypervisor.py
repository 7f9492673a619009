# SPDX-License-Identifier: Apache-2.0
"""The hypervisor: partitions by id, logical processors, system properties."""

from __future__ import annotations

from _thread import RLock

from ..kvm.system import Kvm
from ..tlfs import hypercalls, status
from . import calls
from .deposits import DepositedPages
from .errors import HvError
from .partition import Partition
from .root_partition import RootPartition
from .statistics import Statistics

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..bus.address_space import GuestMemory
    from .child_partition import ChildPartition
    from .guest_partition import GuestPartition
    from .ports import Ports
    from .root_messages import RootMessages
    from .root_scheduler import RootScheduler
    from .synthetic_timers import IdleProcessor
    from .vp import VirtualProcessor

#: The root partition's id. Not 0 (invalid) and not all ones ("self").
ROOT_PARTITION_ID = 1
#: The id of a guest that runs without a root of ours: its parent is not here.
GUEST_PARTITION_ID = 2
MAX_VPS = 64
MAX_LPS = 64


class Version:
    """CPUID 0x40000002. Builds 27744 .. 27751 are the ones that the mshv driver knows."""

    __slots__ = ("build", "major", "minor", "service_pack")

    def __init__(self) -> None:
        self.build = 27751
        self.major = 10
        self.minor = 0
        self.service_pack = 0


class Hypervisor:
    """``scheduler`` is hypercalls.SCHEDULER_HYPERVISOR or SCHEDULER_ROOT."""

    __slots__ = (
        "_clock",
        "_messages",
        "_next_id",
        "_ports",
        "child_timers",
        "deposited",
        "guest",
        "kvm",
        "lock",
        "logical_processors",
        "lost",
        "max_lps",
        "max_vps",
        "partitions",
        "root",
        "root_scheduler",
        "scheduler",
        "sleep_state",
        "statistics",
        "version",
    )

    def __init__(self, kvm: Kvm, scheduler: int = hypercalls.SCHEDULER_HYPERVISOR) -> None:
        calls.load()
        self.kvm = kvm
        #: held while a hypercall does its work, so that the calls of two VPs do not mix; recursive, because a child VP
        #: holds it around its whole call
        self.lock = RLock()
        self.scheduler = scheduler
        #: DISPATCH_VP, if the root schedules and has children
        self.root_scheduler: RootScheduler | None = None
        self.version = Version()
        self.max_vps = MAX_VPS
        self.max_lps = MAX_LPS
        self.partitions: dict[int, Partition] = {}
        #: None in a hypervisor that has a guest instead
        self.root: RootPartition = None  # type: ignore[assignment]
        #: a guest in place of a root
        self.guest: GuestPartition | None = None
        #: ids are never used again: messages carry them
        self._next_id = ROOT_PARTITION_ID + 1
        #: every page of the root that is in some pool, and those that went with a partition
        self.deposited = DepositedPages()
        #: pages that were in a partition's pool when it was deleted: nobody can withdraw them any more
        self.lost: set[int] = set()
        self.statistics = Statistics(self)
        self._clock: IdleProcessor | None = None
        self._messages: RootMessages | None = None
        self._ports: Ports | None = None
        #: LP index -> APIC id; LP 0 exists from the start
        self.logical_processors: dict[int, int] = {0: 0}
        #: (sleep state, PM1a SLP_TYP, PM1b SLP_TYP) that the root announced
        #: whether children may have synthetic timers
        self.child_timers = False
        self.sleep_state: tuple[int, int, int] | None = None

    def create_root(self, memory: GuestMemory, owned: tuple[int, int]) -> RootPartition:
        """The root partition on ``memory``; ``owned`` is (GPA, pages) of the block that belongs to the hypervisor."""
        partition = RootPartition(self, ROOT_PARTITION_ID, memory, owned)
        self.partitions[partition.id] = partition
        self.root = partition
        return partition

    def create_guest(self, memory: GuestMemory, vps: int, address_bits: int) -> GuestPartition:
        """An ordinary partition on ``memory``, in place of a root; there are no others then."""
        from .guest_partition import GuestPartition

        self.guest = partition = GuestPartition(self, GUEST_PARTITION_ID, memory, vps, address_bits)
        self.partitions[partition.id] = partition
        return partition

    def create_child(
        self, vp: VirtualProcessor, flags: int, disabled_features: tuple[int, int, int]
    ) -> ChildPartition:
        """A new child of the root, whose ``vp`` makes the call. KvmError, OSError: the host has no room for another
        machine."""
        from .child_partition import ChildPartition

        if self.scheduler == hypercalls.SCHEDULER_ROOT and self.root_scheduler is None:
            from .root_scheduler import RootScheduler

            self.root_scheduler = RootScheduler(self)
        child = ChildPartition(self, self._next_id, vp, flags, disabled_features)
        self._next_id += 1
        self.partitions[child.id] = child
        return child

    def remove_child(self, child: ChildPartition) -> None:
        """The id is gone. Pages left in its pool are nobody's."""
        del self.partitions[child.id]
        self.lost.update(child.deposits.free)
        self.lost.update(child.deposits.used)

    @property
    def messages(self) -> RootMessages:
        """Messages to the root; made when children first need it."""
        if self._messages is None:
            from .root_messages import RootMessages

            self._messages = RootMessages(self)
        return self._messages

    def clock(self, vp: VirtualProcessor) -> IdleProcessor:
        """Tells the host's TSC to threads that have no processor at hand; made when a child comes to have timers, by
        ``vp`` of the root, which is in a hypercall. KvmError."""
        if self._clock is None:
            from .synthetic_timers import IdleProcessor

            self._clock = IdleProcessor(self.kvm, vp.vcpu)
        return self._clock

    @property
    def ports(self) -> Ports:
        """Ports and connections of all partitions."""
        if self._ports is None:
            from .ports import Ports

            self._ports = Ports(self)
        return self._ports

    def owns(self, gpn: int, count: int) -> bool:
        """Whether some of the root's pages gpn .. gpn + count - 1 are the hypervisor's: reserved, or deposited."""
        return self.root.owned_pages.overlaps(gpn, count) or self.deposited.overlaps(gpn, count)

    def partition(self, caller: Partition, partition_id: int) -> Partition:
        """The partition that a hypercall names: itself, or one of its children. HV_STATUS_INVALID_PARTITION_ID."""
        if partition_id in (hypercalls.SELF, caller.id):
            return caller
        if caller is self.root:
            child = self.partitions.get(partition_id)
            if child is not None:
                return child
        raise HvError(status.INVALID_PARTITION_ID)

    def children(self) -> list[ChildPartition]:
        """All children there are."""
        first = self.guest if self.guest is not None else self.root
        return [partition for partition in self.partitions.values() if partition is not first]  # type: ignore[misc]

    def stop_children(self) -> None:
        """Ends the threads of all children's VPs; the root's have ended."""
        if self.root_scheduler is not None:
            self.root_scheduler.stop()
        for child in self.children():
            child.stop()

    def close(self) -> None:
        """Closes every partition, children first, and /dev/kvm."""
        for partition in reversed(list(self.partitions.values())):
            partition.close()
        self.partitions.clear()
        if self._clock is not None:
            self._clock.close()
        self.kvm.close()
