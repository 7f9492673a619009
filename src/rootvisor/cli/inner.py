# SPDX-License-Identifier: Apache-2.0
"""The process that is the machine: started by `launch` as `python -I -S inner.py PACKAGES DESCRIPTION [debug]`.
`rootvisor guest` starts it in the root partition, with the description of a guest.

It runs without site packages, and imports nothing before it has to: this is the start of the boot path, and
in the appliance every import costs ten times as much. The description is marshal data, because importing json
costs 10 ms here and 100 ms there; marshal is built in and both ends are the same interpreter. PACKAGES is the folder of
third-party packages, searched last: only child partitions need one (see `rootvisor.x86`).
"""

from __future__ import annotations

import marshal
import sys
from _signal import SIGINT, signal  # type: ignore[import-not-found, unused-ignore]
from posix import _exit

# Until the machine has handlers of its own a Ctrl-C ends this process without a word, and what it started with it.
signal(SIGINT, lambda _number, _frame: _exit(130))


def main() -> int:
    """Read the description, run the machine, return the exit status; an unexpected error becomes one line."""
    sys.path.insert(0, __file__.rsplit("/", 3)[0])
    if sys.argv[1]:
        sys.path.append(sys.argv[1])
    with open(sys.argv[2], "rb") as file:
        description = marshal.loads(file.read())
    try:
        if "guest" in description:
            from rootvisor.cli import archived_modules

            archived_modules.use()
            from rootvisor.vmm.agent_run import run as run_guest

            return run_guest(description["guest"])
        from rootvisor.machine.main import run

        return run(description)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if "debug" in sys.argv[3:]:
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())
        sys.stderr.write(f"rootvisor: internal error: {text}; run with --debug for the traceback\n")
        return 125


if __name__ == "__main__":
    sys.exit(main())
