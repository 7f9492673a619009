# SPDX-License-Identifier: Apache-2.0
"""Runs the tests of one group in a root partition: ``python -I -S runner.py IMAGES GROUP [NAME...]``.

A line for each test: ``pass NAME SECONDS``, or ``fail NAME SECONDS`` and the traceback behind it, each line of it
indented; the same for what the kernel complained about. The last line is ``end``. There is no pytest here: importing it
takes a quarter of a minute.
"""

from __future__ import annotations

import os
import sys
import time
from _signal import SIGALRM, SIGUSR1, alarm, signal  # type: ignore[import-not-found, unused-ignore]

#: Seconds that a test may take unless it has an attribute ``limit``.
LIMIT_S = 60
BAD_WORDS = (
    "WARNING:",
    "BUG:",
    "Oops",
    "Call Trace",
    "soft lockup",
    "rcu_",
    "Bad page",
    "Failed to",
    "hung task",
)


def main() -> int:
    """Runs the named tests, or all."""
    sys.path[:0] = [path for path in (_root("src"), _root("")) if path not in sys.path]
    from tests.children import code

    code.load(sys.argv[1])
    module = __import__(f"tests.children.groups.{sys.argv[2]}", fromlist=["x"])
    names = sys.argv[3:] or [name for name in vars(module) if name.startswith("test_")]
    kernel_log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    os.lseek(kernel_log, 0, os.SEEK_END)
    signal(SIGALRM, _too_long)
    signal(SIGUSR1, lambda *_: None)  # rootvisor.mshv interrupts RUN_VP with it
    from rootvisor.mshv import Mshv

    failures = 0
    for name in names:
        failures += not _run(name, getattr(module, name), Mshv, kernel_log)
    print("end", flush=True)
    return bool(failures)


def _root(name: str) -> str:
    return os.path.join(
        os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), name
    ).rstrip("/")


def _too_long(_number: int, _frame: object) -> None:
    raise TimeoutError("the test takes too long")


def _run(name: str, test: object, device: type, kernel_log: int) -> bool:
    assert callable(test)
    started = time.monotonic()
    error: BaseException | None = None
    alarm(int(getattr(test, "limit", LIMIT_S) * float(os.environ.get("ROOTVISOR_TEST_PATIENCE", "1"))))
    try:
        with device() as mshv:
            test(mshv)
    except Exception as caught:
        error = caught
    alarm(0)
    complaints = kernel_lines(kernel_log)
    if not is_bad(complaints):
        complaints = []
    seconds = time.monotonic() - started
    print("fail" if error or complaints else "pass", name, f"{seconds:.2f}")
    if error:
        import traceback

        for line in "".join(traceback.format_exception(error)).splitlines():
            print(f"    {line}")
    for line in complaints:
        print(f"    kernel: {line}")
    sys.stdout.flush()
    return not error and not complaints


def kernel_lines(kernel_log: int) -> list[str]:
    """What the kernel has said since."""
    lines: list[str] = []
    while True:
        try:
            record = os.read(kernel_log, 8192).decode(errors="replace")
        except BlockingIOError:
            return lines
        except BrokenPipeError:  # overrun
            continue
        lines.append(record.partition(";")[2].strip())


def is_bad(lines: list[str]) -> bool:
    return any(word in line for line in lines for word in BAD_WORDS)


if __name__ == "__main__":
    sys.exit(main())
