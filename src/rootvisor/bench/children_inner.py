# SPDX-License-Identifier: Apache-2.0
"""The part of the bench of children that runs where KVM works: ``python -I -S children_inner.py JOB``.

Once on bare KVM, once in a root partition, then on bare KVM again, so that a change of the machine's load meets both.
Progress goes to standard output, the results into the file that the job names.
"""

from __future__ import annotations

import json
import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_DEADLINE_S = 700.0


class SideError(Exception):
    """A program did not do its part; one line."""


def used_bytes() -> int:
    """What this Linux has given away besides page cache; a root partition's memory is page cache."""
    facts: dict[str, int] = {}
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            name, _, rest = line.partition(":")
            facts[name] = int(rest.split()[0]) << 10
    return facts["MemTotal"] - sum(facts[name] for name in ("MemFree", "Buffers", "Cached", "SReclaimable"))


class Reader:
    """Takes the lines of child_loop and of the boots of one side, into `results`."""

    def __init__(self, side: str, results: dict[str, Any], pid: int = 0) -> None:
        self.side = side
        self.pid = pid
        self.results = results
        self._loops = results["loops"].setdefault(side, {"create_ns": [], "delete_ns": [], "marks": []})
        self._idle = results["idle"].setdefault(side, [])
        self._boots = results["boots"]

    def take(self, line: str) -> bool:
        """One line; whether the program waits for a byte."""
        words = line.split()
        if line.startswith("{"):
            self._document(json.loads(line))
        elif words[:1] == ["create"] and len(words) == 2:
            self._loops["create_ns"].append(int(words[1]))
            print(f"children: {self.side}, guest {len(self._loops['create_ns'])}", flush=True)
        elif words[:1] == ["delete"] and len(words) == 2:
            self._loops["delete_ns"].append(int(words[1]))
        elif words[:1] == ["mark"] and len(words) == 3:
            self._loops["marks"].append([int(words[1]), int(words[2])])
        elif words[:1] == ["idle"] and len(words) == 3:
            self._idle.append(self._memory(int(words[1]), int(words[2]) << 10))
            return True
        elif line:
            self.results["problems"].append(f"{self.side}: {line}")
        return False

    def _memory(self, children: int, used: int) -> dict[str, Any]:
        print(f"children: {self.side}, {children} idle", flush=True)
        facts: dict[str, Any] = {"children": children, "used_bytes": used}
        if self.pid:
            from rootvisor.bench.boots import resident_bytes

            facts["engine_used_bytes"] = used_bytes()
            facts["resident_bytes"] = resident_bytes(self.pid)
        return facts

    def _document(self, document: dict[str, Any]) -> None:
        if "root" in document:
            self.results["problems"] += [f"{self.side}: {one}" for one in document["root"]["problems"]]
            return
        boot = document["boot"]
        print(f"children: {boot['name']} under QEMU, {self.side}", flush=True)
        if not boot["ok"]:
            self.results["problems"] += [f"{boot['name']}, {self.side}: {one}" for one in boot["problems"]]
            return
        machine = boot["name"].split()[0]
        sides = self._boots.setdefault(machine, {"mshv": [], "kvm": []})
        sides[self.side].append({"up_s": boot["times"]["up"], "total_s": boot["total_s"]})


def run(argv: list[str], reader: Reader) -> None:
    """Run a program, give its lines to the reader, and a byte where it waits for one. Raises SideError."""
    import subprocess
    from threading import Timer

    process = subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    if reader.pid < 0:
        reader.pid = process.pid
    assert process.stdin is not None
    assert process.stdout is not None
    guard = Timer(_DEADLINE_S, lambda: os.killpg(process.pid, 9))
    guard.start()
    try:
        for line in process.stdout:
            if reader.take(line.strip()):
                process.stdin.write("\n")
                process.stdin.flush()
        status = process.wait()
    finally:
        guard.cancel()
        process.stdin.close()
        process.stdout.close()
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait()
    if status:
        raise SideError(f"{argv[0].rsplit('/', 1)[-1]} for {reader.side} ended with status {status}")


def warm(boots: dict[str, Any], known: dict[tuple[str, str], int]) -> None:
    """Forget the first boot of each machine on each side since the last call: it filled the page cache."""
    for machine, sides in boots.items():
        for side, runs in sides.items():
            start = known.get((machine, side), 0)
            if len(runs) > start:
                del runs[start]
            known[machine, side] = len(runs)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Everything."""
    results: dict[str, Any] = {"loops": {}, "idle": {}, "boots": {}, "problems": []}
    known: dict[tuple[str, str], int] = {}

    def one(side: str, argv: list[str] | None, pid: int = 0) -> None:
        if argv:
            try:
                run(argv, Reader(side, results, pid))
            except (SideError, OSError, ValueError) as error:
                results["problems"].append(str(error))
            warm(results["boots"], known)

    one("kvm", job["loops"]["kvm"])
    one("kvm", job["idles"]["kvm"])
    one("kvm", job["boots"].get("kvm"))
    started = time.monotonic()
    one("mshv", job["root_argv"], -1)
    results["root_s"] = time.monotonic() - started
    one("kvm", job["loops"]["kvm"])
    one("kvm", job["boots"].get("kvm"))
    return results


def main() -> int:
    """The job; without KVM there is nothing to measure."""
    from rootvisor.bench import inner_job

    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        sys.stderr.write("rootvisor: /dev/kvm cannot be opened\n")
        return 1
    return inner_job.run(measure)


if __name__ == "__main__":
    sys.path.insert(0, __file__.rsplit("/", 3)[0])
    sys.exit(main())
