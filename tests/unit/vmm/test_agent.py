# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from rootvisor.vmm.agent import Agent


@pytest.fixture
def agent() -> Iterator[Agent]:
    made = Agent(terminal=False)
    yield made
    made.close()


def test_lines_of_the_agent_are_understood_however_they_are_cut(agent: Agent) -> None:
    for piece in (b"rea", b"dy\nex", b"it 7", b"\n"):
        agent.said(piece)
    assert (agent.ready, agent.status, agent.error) == (True, 7, "")


def test_reason_of_a_failed_guest_is_kept(agent: Agent) -> None:
    agent.said(b"error cannot mount the root file system root\nexit 125\n")
    assert (agent.error, agent.status) == ("cannot mount the root file system root", 125)


@pytest.mark.parametrize(
    "words",
    [b"exit\n", b"exit x\n", b"exit -1\n", b"exit 4711\n", b"exit \xd9\xa3\n", b"\n", b"\xff\xfe ready\n"],
)
def test_words_that_mean_nothing_change_nothing(agent: Agent, words: bytes) -> None:
    agent.said(words)
    assert (agent.ready, agent.status, agent.error) == (False, None, "")


def test_endless_line_is_not_kept(agent: Agent) -> None:
    for _ in range(10):
        agent.said(bytes(1 << 20))
    agent.said(b"\nready\n")
    assert agent.ready
    assert len(agent._pending) == 0


def test_line_to_an_agent_that_does_not_read_is_dropped(agent: Agent) -> None:
    for _ in range(20000):
        agent.tell("signal TERM")


def test_last_words_are_taken_when_the_devices_are_gone() -> None:
    agent = Agent(terminal=False)
    (board,) = agent.consoles()
    words = os.dup(agent._control_out)
    agent.listen()
    board.close()
    os.write(words, b"ready\nexit 3\n")
    os.close(words)
    agent.close()
    assert (agent.ready, agent.status) == (True, 3)


@pytest.mark.parametrize(
    ("terminal", "names"),
    [
        (False, ["console", "rootvisor.stdin", "rootvisor.stdout", "rootvisor.stderr", "rootvisor.control"]),
        (True, ["rootvisor.control"]),
    ],
)
def test_ports_are_those_that_the_agent_looks_for(terminal: bool, names: list[str]) -> None:
    agent = Agent(terminal=terminal)
    (board,) = agent.consoles()
    assert [port.name for port in board.ports] == names
    board.close()
    agent.close()


def test_nothing_is_left_open() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    agent = Agent(terminal=False)
    (board,) = agent.consoles()
    agent.listen()
    board.close()
    agent.close()
    assert sorted(os.listdir("/proc/self/fd")) == before
