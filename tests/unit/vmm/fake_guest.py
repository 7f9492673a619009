# SPDX-License-Identifier: Apache-2.0
"""A guest that does what its name says: python fake_guest.py SCENARIO [TIMEOUT]; its agent talks, its machine ends."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[3] / "src"), str(Path(__file__).parents[3])]

from rootvisor.vmm import agent_machine, agent_run, config  # noqa: E402
from rootvisor.vmm.controller import MachineError  # noqa: E402
from tests.unit.vmm.fake_machine import FakeMachine, Report  # noqa: E402

#: scenario -> (what the agent says, how the guest ends; nothing: it goes on)
SCENARIOS = {
    "exit-7": (b"ready\nexit 7\n", agent_machine.POWEROFF),
    "poweroff": (b"ready\n", agent_machine.POWEROFF),
    "agent-error": (b"error cannot mount root\nexit 125\n", agent_machine.POWEROFF),
    "crash": (b"ready\n", agent_machine.CRASH),
    "reset": (b"ready\n", agent_machine.RESET),
    "triple-fault": (b"", agent_machine.TRIPLE_FAULT),
    "runs": (b"ready\n", ""),
    "hangs": (b"", ""),
    "refused": (b"", ""),
}
said, end = SCENARIOS[sys.argv[1]]


class Guest(FakeMachine):
    agent: Any
    initrds: tuple[str | bytes, ...] = ()
    file_server: tuple[str, ...] = ()
    how = ""

    def __init__(self, document: dict[str, Any], report: Report) -> None:
        if sys.argv[1] == "refused":
            raise MachineError("virtiofsd is missing; apt-get install virtiofsd")
        super().__init__(document, report)
        (self.board,) = self.agent.consoles()
        self.control = os.dup(self.agent._control_out)
        self.orders = os.dup(self.agent._control_in)
        self.log = os.dup(self.agent._theirs[-1])

    def start(self) -> None:
        super().start()
        threading.Thread(target=self.live, daemon=True).start()

    def live(self) -> None:
        os.write(self.log, b"the guest's last line\n")
        os.write(self.control, said)
        if not end:
            while said and not self.agent.ready:
                time.sleep(0.01)
            os.write(1, b"up\n")
            order = os.read(self.orders, 100)
            if not order:
                return  # the run is over
            os.write(self.control, b"exit 42\n" if order == b"signal INT\n" else b"exit 99\n")
        type(self).how = end or agent_machine.POWEROFF
        self.report("shutdown", {})

    def stop(self) -> None:
        super().stop()
        self.board.close()
        os.close(self.control)
        os.close(self.log)


vars(agent_run)["AgentMachine"] = Guest
description = {
    "vm": config.VM.check({"payload": {"kernel": "vmlinux"}}),
    "initrds": ["base", b"request"],
    "file_server": ["virtiofsd"],
    "tty": False,
    "verbose": False,
    "timeout_s": float(sys.argv[2]) if len(sys.argv) > 2 else None,
}
status = agent_run.run(description)
assert Guest.initrds == ("base", b"request")
assert all(machine.state == "stopped" for machine in FakeMachine.made)
os._exit(status)
