# SPDX-License-Identifier: Apache-2.0
"""How a run ended, as an exit status, as words, and as a report file."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..hypervisor.computer_partition import ComputerPartition

STATUS_TRIPLE_FAULT = 121
STATUS_RESET = 122
STATUS_CRASH = 123
STATUS_TIMEOUT = 124
STATUS_FAILURE = 125
STATUS_INTERRUPTED = 130

_STATUS = {
    "poweroff": 0,
    "reset": STATUS_RESET,
    "crash": STATUS_CRASH,
    "triple-fault": STATUS_TRIPLE_FAULT,
    "timeout": STATUS_TIMEOUT,
    "host-error": STATUS_FAILURE,
    "agent-error": STATUS_FAILURE,
    "signal": STATUS_INTERRUPTED,
}


def ending(ended: str, agent_error: str, crash_report: bytes) -> str:
    """How the run ended, from how its partition did.

    A guest that has reported a crash ends with a reset of its own, and an agent that could not go on powers off.
    """
    if ended == "reset" and crash_report:
        return "crash"
    return "agent-error" if ended == "poweroff" and agent_error else ended


def exit_status(how: str, command_status: int | None) -> int:
    """The status of the run: the command's own if it told one and the partition then powered off."""
    if how in ("poweroff", "exit") and command_status is not None:
        return command_status
    return _STATUS.get(how, STATUS_FAILURE)


def totals(partition: ComputerPartition) -> tuple[dict[str, int], dict[str, int]]:
    """Exits by reason and hypercalls by name, over all VPs."""
    from ..kvm.abi import EXIT_NAMES
    from ..tlfs.hypercalls import call_name

    exits: dict[str, int] = {}
    calls: dict[str, int] = {}
    for vp in partition.vps:
        for reason, count in enumerate(vp.exits):
            if count:
                name = EXIT_NAMES.get(reason, str(reason))
                exits[name] = exits.get(name, 0) + count
        for code, count in vp.hypercalls.items():
            name = call_name(code)
            calls[name] = calls.get(name, 0) + count
    return exits, calls


def write_report(path: str, partition: ComputerPartition, facts: dict[str, Any]) -> None:
    """Writes the report of the run: ``facts`` and the totals, as JSON."""
    import json

    exits, calls = totals(partition)
    hypervisor = partition.hypervisor
    report = facts | {
        "exits": exits,
        "hypercalls": calls,
        "interrupts": {
            "delivered": partition.interrupts.delivered,
            "blocked": partition.interrupts.blocked,
        },
        "deposits": {
            "pages": partition.deposits.total,
            "in_use": len(partition.deposits.used),
            "of_children": len(hypervisor.deposited) - partition.deposits.total - len(hypervisor.lost),
            "lost": len(hypervisor.lost),
            "accesses": 0 if hypervisor.deposited.watch is None else hypervisor.deposited.watch.found,
        },
        "children": len(hypervisor.partitions) - 1,
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(report, file, indent=2)
        file.write("\n")
