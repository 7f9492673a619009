# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from rootvisor.hypervisor import root_reaction


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[int]]]:
    """Lets threads be found busy (True) or idle, look by look; gives the looks at them."""
    looks: list[int] = []

    def script(*answers: bool) -> list[int]:
        pending = list(answers)

        def idle(thread: int) -> bool:
            looks.append(thread)
            return not (pending.pop(0) if len(pending) > 1 else pending[0])

        monkeypatch.setattr(root_reaction, "thread_is_idle", idle)
        return looks

    yield script


def test_a_sleeping_thread_is_idle_and_a_computing_one_is_not() -> None:
    ready, end = threading.Event(), threading.Event()

    def sleeper() -> None:
        ready.set()
        end.wait(30.0)

    thread = threading.Thread(target=sleeper)
    thread.start()
    try:
        assert ready.wait(10.0)
        assert thread.native_id is not None
        deadline = time.monotonic() + 10.0
        while not root_reaction.thread_is_idle(thread.native_id):
            assert time.monotonic() < deadline
        assert not root_reaction.thread_is_idle(threading.get_native_id())
    finally:
        end.set()
        thread.join()


def test_a_thread_that_has_ended_is_idle() -> None:
    assert root_reaction.thread_is_idle((1 << 22) + 1)


def test_wait_goes_on_when_every_vp_has_been_idle_twice_in_a_row(states: Callable[..., list[int]]) -> None:
    looks = states(False, True, False, False)
    root_reaction.wait([7, 0], lambda: False)
    assert looks == [7, 7, 7, 7]


def test_wait_ends_at_once_when_something_is_urgent(states: Callable[..., list[int]]) -> None:
    looks = states(True)
    root_reaction.wait([7], lambda: True)
    assert looks == []


def test_wait_ends_although_the_root_is_busy_for_good(
    states: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(root_reaction, "LIMIT_S", 0.02)
    looks = states(True)
    root_reaction.wait([7], lambda: False)
    assert looks


@pytest.mark.parametrize(
    ("port", "answer"),
    [(0x604, True), (0xCF8, True), (0xCFC, False), (0xCFE, False), (0xD00, True), (0x3CE, False), (0, True)],
)
def test_words_at_ports_are_commands_but_for_configuration_space_and_vga(port: int, answer: bool) -> None:
    assert root_reaction.is_command(port) is answer
