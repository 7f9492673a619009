# SPDX-License-Identifier: Apache-2.0
"""Start a prepared run: in place of this process (engine kvm), or in the appliance.

The machine runs without site packages and without click (see `inner`). It gets the run description in a file:
an anonymous one that lives as long as the process (engine kvm), or one in a temporary folder (appliance).
Either way nothing is left when the run ends, however it ends.
"""

from __future__ import annotations

import marshal
import os
import sys

from rootvisor.cli.description import RunDescription
from rootvisor.cli.errors import UserError
from rootvisor.cli.paths import source_root
from rootvisor.cli.prepare import RunPlan, python_argv


def inner_argv(description_path: str, debug: bool) -> list[str]:
    """Command line of the process that is the machine."""
    script = source_root() / "rootvisor" / "cli" / "inner.py"
    return [*python_argv(), str(script), description_path, *(["debug"] if debug else [])]


def encode(description: RunDescription) -> bytes:
    """The description file's content."""
    return marshal.dumps(description.document(), 2)


def anonymous_file(name: str, content: bytes) -> str:
    """A path to `content` that this process and what it executes can open, and that vanishes with them."""
    fd = os.memfd_create(name, 0)
    with open(os.dup(fd), "wb") as file:
        file.write(content)
    os.set_inheritable(fd, True)
    return f"/proc/self/fd/{fd}"


def exec_machine(plan: RunPlan) -> int:
    """Become the machine (engine kvm): signals, streams and exit status need no forwarding.

    Does not return, unless the interpreter cannot be executed (`UserError`).
    """
    description_path = anonymous_file("rootvisor-run", encode(plan.description))
    argv = inner_argv(description_path, plan.debug)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execv(argv[0], argv)
    except OSError as error:
        raise UserError(f"cannot execute {argv[0]}: {(error.strerror or str(error)).lower()}") from error


def launch(plan: RunPlan) -> int:
    """Start the run and give its exit status; with engine kvm a successful start does not return."""
    return exec_machine(plan)
