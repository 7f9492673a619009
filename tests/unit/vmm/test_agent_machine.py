# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from _thread import allocate_lock
from types import SimpleNamespace

import pytest

from rootvisor.vmm import agent_machine
from rootvisor.vmm.agent_machine import AgentMachine


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> AgentMachine:
    """One without a partition; `reports` has what the controller would be told."""
    monkeypatch.setattr(AgentMachine, "how", "")
    made = AgentMachine.__new__(AgentMachine)
    made._lock = allocate_lock()
    made._ended = False
    made._ram = SimpleNamespace(low=memoryview(bytearray(4096)))  # type: ignore[assignment]
    reports: list[str] = []
    made.reports = reports  # type: ignore[attr-defined]
    made._report = lambda event, _details: reports.append(event)
    return made


@pytest.mark.parametrize(
    ("how", "detail", "flag", "expected"),
    [
        ("poweroff", "S5", b"\0\0", agent_machine.POWEROFF),
        ("reset", "reset register", b"\0\0", agent_machine.RESET),
        ("reset", "reset register", agent_machine.WARM, agent_machine.CRASH),
        ("reset", "triple fault", b"\0\0", agent_machine.TRIPLE_FAULT),
    ],
)
def test_every_end_is_told_apart_and_ends_the_guest(
    machine: AgentMachine, how: str, detail: str, flag: bytes, expected: str
) -> None:
    assert machine._ram is not None
    machine._ram.low[agent_machine.RESET_FLAG : agent_machine.RESET_FLAG + 2] = flag
    machine._end(how, detail)
    assert AgentMachine.how == expected
    assert machine.reports == ["shutdown"]  # type: ignore[attr-defined]


def test_first_end_counts(machine: AgentMachine) -> None:
    machine._end("poweroff", "S5")
    machine._end("reset", "triple fault")
    assert AgentMachine.how == agent_machine.POWEROFF
    assert machine.reports == ["shutdown"]  # type: ignore[attr-defined]


def test_guest_without_its_root_file_system_ends(machine: AgentMachine) -> None:
    machine._device_failed("__root", "the server hung up")
    assert machine.reports == ["failed"]  # type: ignore[attr-defined]
    machine._device_failed("__rng", "no")
    assert machine.reports == ["failed", "device-failed"]  # type: ignore[attr-defined]
