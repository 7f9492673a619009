# SPDX-License-Identifier: Apache-2.0
"""ACPI fixed hardware and the ways to reset."""

from __future__ import annotations

import marshal

import pytest

from rootvisor.chips.power import KeyboardReset, PowerManagement, ResetControl

STATUS, ENABLE, CONTROL = 0, 2, 4


class Board:
    def __init__(self) -> None:
        self.levels: list[int] = []
        self.ended: list[str] = []
        self.power = PowerManagement(self.levels.append, self.end)

    def end(self, how: str, _detail: str) -> None:
        self.ended.append(how)


@pytest.fixture
def board() -> Board:
    return Board()


def test_power_button_interrupts_until_it_is_acknowledged(board: Board) -> None:
    board.power.write(ENABLE, 2, 1 << 8)
    board.power.press_power_button()
    assert board.levels[-1] == 1
    assert board.power.read(STATUS, 2) == 1 << 8
    board.power.write(STATUS, 2, 1 << 8)
    assert (board.levels[-1], board.power.read(STATUS, 2)) == (0, 0)


def test_power_button_is_silent_without_enable(board: Board) -> None:
    board.power.press_power_button()
    assert board.levels[-1] == 0
    board.power.write(ENABLE, 2, 1 << 8)
    assert board.levels[-1] == 1


def test_acpi_mode_is_on(board: Board) -> None:
    assert board.power.read(CONTROL, 2) & 1


@pytest.mark.parametrize("value", [0x3400, 0x3401])
def test_s5_powers_off(board: Board, value: int) -> None:
    board.power.write(CONTROL, 2, 0x1401)  # SLP_TYP alone
    assert board.ended == []
    board.power.write(CONTROL, 2, value)
    assert board.ended == ["poweroff"]


def test_other_sleep_types_do_not(board: Board) -> None:
    for kind in (0, 1, 2, 3, 4, 6, 7):
        board.power.write(CONTROL, 2, 1 << 13 | kind << 10)
    assert board.ended == []


def test_reset_register(board: Board) -> None:
    reset = ResetControl(board.end)
    reset.write(0, 1, 2)
    assert (board.ended, reset.read(0, 1)) == ([], 2)
    reset.write(0, 1, 6)
    assert board.ended == ["reset"]


def test_keyboard_reset(board: Board) -> None:
    keyboard = KeyboardReset(board.end)
    keyboard.write(0, 1, 0xAA)
    assert (board.ended, keyboard.read(0, 1)) == ([], 0xFF)
    keyboard.write(0, 1, 0xFE)
    assert board.ended == ["reset"]


def test_saved_events_interrupt_in_another_chip(board: Board) -> None:
    board.power.write(ENABLE, 2, 1 << 8)
    board.power.press_power_button()
    state = marshal.loads(marshal.dumps(board.power.save()))
    other = Board()
    other.power.restore(state)
    assert other.levels == [1]
    assert other.power.button_enabled
    assert other.power.save() == state
    other.power.write(STATUS, 2, 1 << 8)
    assert other.levels[-1] == 0
    with pytest.raises(KeyError):
        other.power.restore({})
