# SPDX-License-Identifier: Apache-2.0
"""VMMs by the dozen in a root partition: ``python -I -S vmms.py IMAGES WHAT [NUMBER [SEED]]``.

    kills N SEED    N VMMs, each killed with SIGKILL at a random moment of its life, beside two that go on working
    cycles N        N partitions, one after the other, from creation to deletion
    many N MIB      N VMMs at once, each of which has its guest of 128 MiB fill so many and add them up
    leave N         N VMMs with guests at work, and then nothing more

What it says is for tests/kvm/test_vmms.py, which looks at the hypervisor's process from outside: after a line that ends
with "?" it waits for one on standard input.
"""

from __future__ import annotations

import mmap
import os
import random
import sys
import time
from _signal import SIGKILL, SIGUSR1, signal  # type: ignore[import-not-found, unused-ignore]

STAGES = ("start", "created", "initialized", "mapped", "vps", "events", "running")
DEBUGFS = "/sys/kernel/debug"
PARTITIONS = f"{DEBUGFS}/mshv/partition"
DEADLINE_S = 240.0
MIB = 1 << 20
#: A byte for the stage of the VMM that is killed, then a u64 for each that goes on.
_shared = mmap.mmap(-1, 4096)
#: The byte that lets VMMs go on which are to be there all at once.
_GO = 4095


def say(text: str) -> None:
    print(text, flush=True)


def ask(text: str) -> None:
    """Says something, and waits for the answer."""
    say(f"{text}?")
    if not sys.stdin.readline():
        sys.exit("nobody answers")


def children() -> list[str]:
    """Ids of the partitions in debugfs, without the root's."""
    return sorted(name for name in os.listdir(PARTITIONS) if name.isdigit() and name != "1")


def wait_for(condition: object, what: str) -> None:
    assert callable(condition)
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"waited in vain: {what}")
        time.sleep(0.01)


def fork(work: object) -> int:
    """A process that does ``work``; its id."""
    assert callable(work)
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def at_work(slot: int) -> None:
    """A VMM whose guest counts and asks for an answer now and then; each answer is counted in ``slot``."""
    from rootvisor.mshv import Mshv
    from tests.children.guest import QEMU_FEATURES, Guest
    from tests.children.guests_at_work import COUNT

    counters = memoryview(_shared).cast("Q")
    # with timers, so that their clock, which all partitions share, is there from the start
    with Mshv() as mshv, Guest(mshv, COUNT, features=QEMU_FEATURES) as guest:
        while True:
            guest.skip(guest.next())
            counters[slot] += 1


def doomed(seed: int) -> None:
    """A VMM that goes through the life of a partition for as long as it has."""
    from rootvisor.mshv import IoPort, Memory, MemoryAccess, Mshv
    from tests.children.guest import Guest, Runner
    from tests.children.guests_at_work import BELL, FAULTS, FREE_GPA

    pick = random.Random(seed)

    def stage(name: str) -> None:
        _shared[0] = STAGES.index(name)

    with Mshv() as mshv:
        vps = pick.choice((1, 1, 2, 4))
        size = pick.choice((2, 8, 32)) * MIB
        guest = Guest(
            mshv, FAULTS, memory=4 * MIB, vps=vps, features=pick.choice((None, 0x06400FFB)), stage=stage
        )
        more = Memory(size, huge_pages=pick.random() < 0.5)
        region = guest.partition.map(FREE_GPA, more)
        fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(pick.randrange(1, 9))]
        guest.partition.set_msi_routing([(n, 0xFEE00000, 0x40 + n) for n in range(len(fds))])
        for number, fd in enumerate(fds):
            guest.partition.add_irqfd(fd, number)
            guest.partition.add_doorbell(BELL + 0x1000 * number, fd)
        stage("events")
        for vp in guest.vps[1:]:
            guest.long_mode(vp, internal_activity_state=0)
        for vp in guest.vps:
            vp.set_registers(rbx=FREE_GPA, rcx=size >> 12, rdx=BELL + 0x1000 * pick.randrange(9))
        stage("running")
        runners = [Runner(guest, vp).start() for vp in guest.vps]
        while True:
            for number, runner in enumerate(runners):
                message = runner.wait()
                if isinstance(message, IoPort):
                    guest.skip(message, runner.vp)
                elif isinstance(message, MemoryAccess):
                    runner.vp.register_page.rip = message.rip + message.instruction_length
                runners[number] = Runner(guest, runner.vp).start()
            os.eventfd_write(pick.choice(fds), 1)
            roll = pick.random()
            if roll < 0.2:
                more.discard()
            elif roll < 0.3:
                region.unmap()
                region = guest.partition.map(FREE_GPA, more)


def kills(count: int, seed: int) -> None:
    """See above. The life of a VMM is measured first; moments are spread over twice of what it takes to run."""
    from tests.children import guest, guests_at_work  # noqa: F401

    counters = memoryview(_shared).cast("Q")
    workers = [fork(lambda slot=slot: at_work(slot)) for slot in (1, 2)]
    wait_for(lambda: counters[1] and counters[2], "the guests that go on")
    own = children()
    pick = random.Random(seed)
    longest = DEADLINE_S
    for number in range(3):  # what is made once is made: statistics pages, threads, memory of the interpreter
        _shared[0] = 0
        started = time.monotonic()
        pid = fork(lambda: doomed(seed))
        wait_for(lambda: _shared[0] == STAGES.index("running"), "a VMM that runs")
        longest = min(longest, time.monotonic() - started)
        os.kill(pid, SIGKILL)
        os.waitpid(pid, 0)
        wait_for(lambda: children() == own, f"the partition of warm-up {number} is gone")
    ask("ready")
    killed = dict.fromkeys(STAGES, 0)
    slowest = 0.0
    for number in range(count):
        _shared[0] = 0
        pid = fork(lambda number=number: doomed(seed + number))
        time.sleep(
            pick.uniform(0.0, 1.5 * longest) if pick.random() < 0.7 else pick.uniform(longest, 4 * longest)
        )
        os.kill(pid, SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.waitstatus_to_exitcode(status) != -SIGKILL:
            sys.exit(f"VMM {number} ended by itself: status {status}")
        killed[STAGES[_shared[0]]] += 1
        started = time.monotonic()
        before = counters[1], counters[2]
        wait_for(lambda: children() == own, f"the partition of VMM {number} is gone")
        slowest = max(slowest, time.monotonic() - started)
        wait_for(
            lambda before=before: counters[1] > before[0] and counters[2] > before[1],
            f"the other guests go on after VMM {number}",
        )
        if any(os.waitpid(worker, os.WNOHANG)[0] for worker in workers):
            sys.exit("a VMM that was to go on has ended")
        complain(kills=True)
        ask(f"killed {number} {STAGES[_shared[0]]}")
    for worker in workers:
        os.kill(worker, SIGKILL)
        os.waitpid(worker, 0)
    wait_for(lambda: children() == [], "all partitions are gone")
    say(f"figure {count} kills: {killed}; a partition is gone after {slowest:.2f} s at most")


def cycles(count: int) -> None:
    from rootvisor.mshv import Mshv
    from tests.children.guest import QEMU_FEATURES, Guest
    from tests.children.guests_at_work import DONE

    #: direct, vector 0xE1, each millisecond: deleted while it expires
    timer = {"stimer0_config": 0x1E13, "stimer0_count": 10_000}
    with Mshv() as mshv:
        for _ in range(20):
            with Guest(mshv, DONE, vps=2, features=QEMU_FEATURES) as guest:
                guest.vp.set_registers(**timer)
                guest.finish()
        ask("ready")
        started = time.monotonic()
        for number in range(1, count + 1):
            with Guest(mshv, DONE, vps=2, features=QEMU_FEATURES if number & 1 else None) as guest:
                if number & 1:
                    guest.vp.set_registers(**timer)
                guest.finish()
            if not number % 50 or number == count:
                complain()
                ask(f"cycles {number}")
        say(f"figure {count} partitions in {time.monotonic() - started:.1f} s")
    wait_for(lambda: children() == [], "all partitions are gone")


def sum_up(number: int, mib: int) -> None:
    """Fills ``mib`` of a guest's 128 MiB, above the first 8, and adds them up."""
    from rootvisor.mshv import Mshv
    from tests.children.guest import Guest
    from tests.children.guests_at_work import FILL_AND_SUM

    with Mshv() as mshv, Guest(mshv, FILL_AND_SUM, memory=128 * MIB) as guest:
        while not _shared[_GO]:
            time.sleep(0.02)
        pages = mib * MIB >> 12
        guest.vp.set_registers(rbx=8 * MIB, rcx=pages, rdx=number)
        (total,) = guest.finish()
        expected = sum(range(number, number + pages)) & 0xFFFFFFFF
        if total != expected:
            raise AssertionError(f"guest {number} counts {total:#x}, not {expected:#x}")


def many(count: int, mib: int) -> None:
    pids = [fork(lambda number=number: sum_up(number, mib)) for number in range(count)]
    wait_for(lambda: len(children()) == count, "all partitions are there")
    ask("all are there")
    started = time.monotonic()
    _shared[_GO] = 1
    for number, pid in enumerate(pids):
        _, status = os.waitpid(pid, 0)
        if status:
            sys.exit(f"VMM {number} ended with status {status}")
    say(f"figure {count} guests of 128 MiB fill and add {mib} MiB each in {time.monotonic() - started:.1f} s")
    wait_for(lambda: children() == [], "all partitions are gone")
    complain()


def leave(count: int) -> None:
    counters = memoryview(_shared).cast("Q")
    for slot in range(1, count + 1):
        fork(lambda slot=slot: at_work(slot))
    wait_for(lambda: all(counters[slot] > 3 for slot in range(1, count + 1)), "guests at work")
    say("at work")


#: Linux 7.3 warns of itself when a VMM dies by a signal while its page fault is in work: the fault ends with EINTR
#: (mshv_regions.c:mshv_region_handle_gfn_fault, mm/hmm.c:hmm_range_fault_unlocked_timeout).
FAULT_OF_A_KILL = "GPA intercept failed: region"


def is_of_a_kill(line: str) -> bool:
    """Whether the driver tells that a call about a partition ended with EINTR, as one of a killed VMM does."""
    first = line.partition("\n")[0]
    return "mshv: p" in first and first.endswith(": -4")


def complain(kills: bool = False) -> None:
    """Ends when the kernel has said something that it should not; what a kill explains is allowed with ``kills``."""
    lines = runner.kernel_lines(kernel_log)
    if kills:
        lines = [line for line in lines if not is_of_a_kill(line)]
        while any(FAULT_OF_A_KILL in line for line in lines):
            at = next(number for number, line in enumerate(lines) if FAULT_OF_A_KILL in line)
            start = max(number for number, line in enumerate(lines[:at]) if "cut here" in line)
            end = next(number for number, line in enumerate(lines) if number > at and "end trace" in line)
            say(f"the kernel warns of a killed VMM: {lines[at]}")
            del lines[start : end + 1]
    if runner.is_bad(lines):
        sys.exit("\n".join(lines))


if __name__ == "__main__":
    top = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    sys.path[:0] = [os.path.join(top, "src"), top]
    from tests.children import code, runner

    code.load(sys.argv[1])
    signal(SIGUSR1, lambda *_: None)
    kernel_log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    os.lseek(kernel_log, 0, os.SEEK_END)
    if not os.path.isdir(PARTITIONS):
        os.system(f"mount -t debugfs debugfs {DEBUGFS}")
    numbers = [int(word) for word in sys.argv[3:]]
    if sys.argv[2] == "kills":
        kills(*numbers)
    elif sys.argv[2] == "cycles":
        cycles(*numbers)
    elif sys.argv[2] == "many":
        many(*numbers)
    else:
        leave(*numbers)
    say("end")
