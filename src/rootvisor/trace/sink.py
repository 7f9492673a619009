# SPDX-License-Identifier: Apache-2.0
"""Record trace events while the machine runs, without slowing it down much, and hand them to another process.

There is no object for "off": the hypervisor holds None instead of a `Sink`, so that a trace point is one
test.

trace = partition.trace if trace is not None: trace.hypercall(vp, control, data, status, reps, t0, t1)

Recording appends a tuple to a list (well below a microsecond). A thread hands the list over every 0.2 s, as
marshal data in a pipe, to a process that decodes it (`encode`): text is never made next to a running VP,
because a computing thread would make every exit wait for the interpreter lock. When this process is killed,
the pipe ends and the other process writes what it got.
"""

from __future__ import annotations

import marshal
import os
import sys
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

HYPERCALL = 0
"""Record `(HYPERCALL, t0, t1, partition, vp, control, input, status, reps, output)`; times in ns (monotonic).
"""

MSR = 1
"""Record `(MSR, t, partition, vp, index, is_write, value, faulted)`."""

INTERCEPT = 2
"""Record `(INTERCEPT, t, partition, vp, message_type, detail)`."""

EVENT = 3
"""Record `(EVENT, t, partition, vp, name, detail)`; vp -1 when it belongs to none."""

HEADER = 4
"""First record: `(HEADER, monotonic ns, Unix time in ns)`; all times in the file are relative to it."""

MAX_DATA_BYTES = 512
"""Bytes of a hypercall's input or output that are kept."""

MAX_WAITING = 1 << 16
"""Records that may wait; the VP that records one more hands them over itself (and waits for the reader)."""

_PERIOD_S = 0.2


class TraceError(Exception):
    """The trace cannot be written; one line with the mend."""


class Sink:
    """Records events of all partitions. Methods may be called from any thread; they never raise."""

    __slots__ = ("_failed", "_fd", "_lock", "_pid", "_records", "_stop", "_thread")

    def __init__(self, fd: int, pid: int = 0) -> None:
        """Write to the pipe `fd` (owned from now on); `pid` is the process behind it, 0 for none of ours."""
        self._fd = fd
        self._pid = pid
        self._failed = False
        self._lock = threading.Lock()
        self._records: list[tuple[Any, ...]] = [(HEADER, time.monotonic_ns(), time.time_ns())]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._hand_over, name="trace", daemon=True)
        self._thread.start()

    def hypercall(
        self,
        vp: int,
        control: int,
        data: bytes | bytearray | memoryview,
        status: int,
        reps: int,
        t0: int,
        t1: int,
        partition: int = 1,
        output: bytes | bytearray | memoryview = b"",
    ) -> None:
        """One hypercall of `vp`: control word, input block, HV_STATUS, reps completed, start and end
        (monotonic ns).
        """
        record = (HYPERCALL, t0, t1, partition, vp, control, bytes(data[:MAX_DATA_BYTES]), status, reps)
        self._add((*record, bytes(output[:MAX_DATA_BYTES])))

    def msr(
        self, vp: int, index: int, is_write: bool, value: int, partition: int = 1, faulted: bool = False
    ) -> None:
        """One access to a synthetic MSR: the value written or read; `faulted` when it ended in #GP."""
        self._add((MSR, time.monotonic_ns(), partition, vp, index, bool(is_write), value, faulted))

    def intercept(self, vp: int, partition: int, message_type: int, detail: str = "") -> None:
        """An intercept message about a child's `vp`, sent to its parent."""
        self._add((INTERCEPT, time.monotonic_ns(), partition, vp, message_type, detail))

    def event(self, name: str, detail: str = "", vp: int = -1, partition: int = 1) -> None:
        """Anything else worth a line: reset, crash report, first line of user space."""
        self._add((EVENT, time.monotonic_ns(), partition, vp, name, detail))

    def _add(self, record: tuple[Any, ...]) -> None:
        if self._failed:
            return
        records = self._records
        records.append(record)
        if len(records) > MAX_WAITING:
            self.flush()

    def flush(self) -> None:
        """Hand over what is recorded so far."""
        with self._lock:
            records = self._records
            count = len(records)
            if not count or self._fd < 0:
                return
            # The list object stays the same: another thread may append between these two lines.
            batch = records[:count]
            del records[:count]
            if self._failed:
                return
            try:
                _write_frame(self._fd, marshal.dumps(batch, 2))
            except OSError:
                self._failed = True

    def _hand_over(self) -> None:
        while not self._stop.wait(_PERIOD_S):
            self.flush()

    def close(self) -> str:
        """Hand over the rest and wait until the file is complete; '' or one line that says what failed."""
        self._stop.set()
        self._thread.join()
        self.flush()
        with self._lock:
            if self._fd < 0:
                return ""
            os.close(self._fd)
            self._fd = -1
        status = 0
        if self._pid:
            try:
                status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
            except ChildProcessError:
                pass
        if status or self._failed:
            return "the trace file is incomplete: its writer stopped early; is its disk full?"
        return ""


def open_sink(path: str) -> Sink:
    """Create the trace file and start its writer; `TraceError` when that fails."""
    try:
        output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    except OSError as error:
        reason = os.strerror(error.errno or 0).lower()
        raise TraceError(
            f"cannot write the trace file {path}: {reason}; give another --trace FILE"
        ) from error
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    script = __file__.rpartition("/")[0] + "/encode.py"
    argv = [sys.executable, "-I", "-S", "-X", "utf8", script]
    try:
        pid = os.posix_spawn(
            sys.executable,
            argv,
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, read_end, 0), (os.POSIX_SPAWN_DUP2, output, 1)],
            setpgroup=0,  # Ctrl-C must not end it before the last record
        )
    except OSError as error:
        os.close(write_end)
        raise TraceError(f"cannot start the trace writer: {os.strerror(error.errno or 0).lower()}") from error
    finally:
        os.close(read_end)
        os.close(output)
    return Sink(write_end, pid)


def _write_frame(fd: int, payload: bytes) -> None:
    """A frame: length (4 bytes, little-endian), then marshal data (a list of records)."""
    view = memoryview(len(payload).to_bytes(4, "little") + payload)
    while view:
        view = view[os.write(fd, view) :]
