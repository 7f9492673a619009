# SPDX-License-Identifier: Apache-2.0
"""The measuring process: runs where KVM works, reads what to do from a JSON file, prints the results as JSON.

Started as `python -I -S inside.py SPECIFICATION`. The specification has `exits` (image, library, count, rounds) and
`boot` (rootvisor and qemu: command lines; rounds); either may be null. The last line of the output is the result.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, __file__.rsplit("/", 3)[0])


def measure(specification: dict[str, Any]) -> dict[str, Any]:
    """All the measurements that are asked for."""
    from rootvisor.bench import boot, exits
    from rootvisor.kvm.selftest import run_guest
    from rootvisor.kvm.system import Kvm

    result: dict[str, Any] = {"kernel": os.uname().release, "processors": len(os.sched_getaffinity(0))}
    if specification.get("exits"):
        result["exits"] = exits.measure(**specification["exits"])
    if specification.get("boot"):
        wanted = specification["boot"]
        kvm = Kvm()
        _problem, xsave = run_guest(kvm)
        kvm.close()
        qemu = boot.with_processor(wanted["qemu"], xsave)
        result["boot"] = boot.measure(wanted["rootvisor"], qemu, wanted["rounds"])
    return result


def main() -> int:
    """Measure and print; an error is one line on stderr and status 1."""
    with open(sys.argv[1], encoding="utf-8") as file:
        specification = json.load(file)
    try:
        result = measure(specification)
    except Exception as error:
        if specification.get("debug"):
            raise
        sys.stderr.write(f"rootvisor: {' '.join(f'{type(error).__name__}: {error}'.split())}\n")
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
