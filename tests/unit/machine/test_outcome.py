# SPDX-License-Identifier: Apache-2.0
"""How a run ends, from how its partition did and what the agent said."""

from __future__ import annotations

import pytest

from rootvisor.machine.outcome import ending, exit_status


@pytest.mark.parametrize(
    ("ended", "agent_error", "crash_report", "expected", "status"),
    [
        ("poweroff", "", b"", "poweroff", 7),
        ("poweroff", "cannot mount the root", b"", "agent-error", 125),
        ("reset", "", b"", "reset", 122),
        ("reset", "", b"Kernel panic", "crash", 123),
        ("crash", "", b"Kernel panic", "crash", 123),
        ("triple-fault", "cannot mount the root", b"", "triple-fault", 121),
        ("timeout", "", b"", "timeout", 124),
    ],
)
def test_ending_and_status(
    ended: str, agent_error: str, crash_report: bytes, expected: str, status: int
) -> None:
    how = ending(ended, agent_error, crash_report)
    assert how == expected
    assert exit_status(how, 7) == status
