# SPDX-License-Identifier: Apache-2.0
"""A VMM with a fake machine: python fake_vmm.py OPTIONS. SIGRTMIN: its guest powers off, SIGRTMAX: reboots."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[3] / "src"), str(Path(__file__).parents[3])]

from rootvisor.vmm import main  # noqa: E402
from rootvisor.vmm.options import parse_command_line  # noqa: E402
from tests.unit.vmm.fake_machine import FakeMachine  # noqa: E402


def guest_does(what: str) -> None:
    FakeMachine.made[-1].report(what, {})


signal.signal(signal.SIGRTMIN, lambda _number, _frame: guest_does("shutdown"))
signal.signal(signal.SIGRTMAX, lambda _number, _frame: guest_does("reboot"))
main.machine_class = lambda: FakeMachine
if "--fail" in sys.argv:
    sys.argv.remove("--fail")
    FakeMachine.failing["start"] = ZeroDivisionError("zork")
status = main.run(parse_command_line(sys.argv[1:]))
assert all(machine.state == "stopped" for machine in FakeMachine.made)
sys.exit(status)
