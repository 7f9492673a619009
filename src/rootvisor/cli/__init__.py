# SPDX-License-Identifier: Apache-2.0
"""Commands: text becomes frozen descriptions, descriptions are checked against the host, then something runs.

The order is always the same: `values` and `options` turn text into values and open nothing; `description`
holds the result as plain data; `prepare` looks at the host; `launch` starts the run. Only this package
imports click.

`rootvisor vmm` is another matter: it runs in the root partition, where Python is ten times slower and click costs a
second. Its command line is parsed by `rootvisor.vmm.options`; only help and errors come from here.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the `rootvisor` command: run it and leave with its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["vmm"]:
        status = _run_vmm(words[1:])
        if status is not None:
            sys.exit(status)
    from rootvisor.cli.app import main as general_main

    general_main(words)


def _run_vmm(arguments: Sequence[str]) -> int | None:
    """The exit status of `rootvisor vmm`; None: the command line is wrong or asks for help, which click shows."""
    from rootvisor.cli import archived_modules

    archived_modules.use()
    from rootvisor.vmm.options import parse_command_line
    from rootvisor.vmm.schema import ConfigError

    try:
        command_line = parse_command_line(arguments)
    except ConfigError:
        return None
    from rootvisor.vmm.main import run

    return run(command_line)
