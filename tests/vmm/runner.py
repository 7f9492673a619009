# SPDX-License-Identifier: Apache-2.0
"""Runs tests of the VMM in a root partition: ``python -I -S runner.py JOB [GROUP[:NAME]...]``.

JOB is what tests/vmm/job.py wrote. A test is a function of a module in tests/vmm/cases; it gets the job. A line for
each: ``pass GROUP:NAME SECONDS``, or ``fail GROUP:NAME SECONDS`` and the reason behind it, each line indented;
``note`` lines before it are its figures.
The last line is ``end``. No pytest in here: it takes a quarter of a minute to import.
"""

from __future__ import annotations

import json
import os
import sys
import time
from _signal import SIGALRM, SIGKILL, alarm, signal  # type: ignore[import-not-found, unused-ignore]

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
#: Seconds that a test may take unless it has an attribute ``limit``.
LIMIT_S = 300


def main() -> int:
    """Runs what is named."""
    sys.path[:0] = [os.path.join(ROOT, "src"), ROOT]
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    sys.path.append(job["libraries"])
    _import_the_vmm()
    from rootvisor.peers.inner import KernelLog, bring_up_loopback, partitions, serve

    bring_up_loopback()
    with open(job["page"], "rb") as page:
        server = serve(page.read(), job["port"])
    signal(SIGALRM, _too_long)
    log = KernelLog()
    failures = 0
    for word in sys.argv[2:]:
        group, _, wanted = word.partition(":")
        module = __import__(f"tests.vmm.cases.{group}", fromlist=["x"])
        for name in [wanted] if wanted else [name for name in vars(module) if name.startswith("test_")]:
            failures += not _run(f"{group}:{name}", getattr(module, name), job, log, partitions)
    os.kill(server, SIGKILL)
    os.waitpid(server, 0)
    print("end", flush=True)
    return bool(failures)


def _import_the_vmm() -> None:
    """Once, before the forks."""
    import rootvisor.cli
    import rootvisor.virtio.console
    import rootvisor.virtio.rng
    import rootvisor.virtio.vhost_user_block
    import rootvisor.vmm.main
    import rootvisor.vmm.options

    rootvisor.vmm.main.machine_class()


def _too_long(_number: int, _frame: object) -> None:
    raise TimeoutError("the test takes too long")


def _run(name: str, test: object, job: dict[str, object], log: object, partitions: object) -> bool:
    assert callable(test) and callable(partitions)
    print("begin", name, flush=True)
    started = time.monotonic()
    error: BaseException | None = None
    alarm(int(getattr(test, "limit", LIMIT_S) * float(os.environ.get("ROOTVISOR_TEST_PATIENCE", "1"))))
    try:
        test(job)
    except Exception as caught:
        error = caught
    alarm(0)
    complaints = log.complaints()  # type: ignore[attr-defined]
    left = partitions()
    if left and error is None:
        complaints.append(f"{len(left)} child partitions are left")
    seconds = time.monotonic() - started
    print("fail" if error or complaints else "pass", name, f"{seconds:.2f}")
    if error:
        lines = str(error).splitlines() or [type(error).__name__]
        if not isinstance(error, AssertionError) or len(lines) == 1:
            import traceback

            lines = "".join(traceback.format_exception(error)).splitlines()
        for line in lines:
            print(f"    {line}")
    for line in complaints:
        print(f"    root: {line}")
    sys.stdout.flush()
    return not error and not complaints


if __name__ == "__main__":
    sys.exit(main())
