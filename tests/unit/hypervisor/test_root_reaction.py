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
    assert root_reaction.Watch().is_command(port) is answer


def test_watch_finds_a_read_that_is_repeated_and_nothing_else() -> None:
    watch = root_reaction.Watch()
    assert not watch.left
    watch.command()
    reads = [(0x100, 0x604), (0x100, 0x604), (0x104, 0x604), (0x104, 0x600), (0x104, 0x600)]
    assert [watch.polls(*read, False) for read in reads] == [False, True, False, False, True]
    assert not watch.polls(0x104, 0x600, True)
    assert not watch.polls(0x104, 0x600, True), "writes are no polling"
    assert not watch.polls(0x104, 0x600, False), "nor is the read after one"


def test_watch_ends_after_some_accesses_and_begins_anew_with_the_next_command() -> None:
    watch = root_reaction.Watch()
    watch.command()
    accesses = 0
    while watch.left:
        watch.polls(1, 2, False)
        accesses += 1
    assert 8 <= accesses <= 64
    watch.command()
    assert not watch.polls(1, 2, False)


def test_wait_for_a_polling_guest_wants_the_root_idle_for_longer(states: Callable[..., list[int]]) -> None:
    looks = states(*(False,) * 5, True, False)
    root_reaction.wait([7], lambda: False, root_reaction.QUIET_AT_POLL)
    assert len(looks) == 6 + root_reaction.QUIET_AT_POLL


def test_words_at_one_port_again_and_again_are_no_commands() -> None:
    watch = root_reaction.Watch()
    answers = [watch.is_command(0xC010) for _ in range(100)]
    assert answers[:8] == [True] * 8
    assert answers[-8:] == [False] * 8
    assert watch.is_command(0x604)
