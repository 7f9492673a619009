# SPDX-License-Identifier: Apache-2.0
"""What a child's VP makes of failures of KVM_RUN that nobody can be blamed for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rootvisor.hypervisor import child_vp, memory_access
from rootvisor.hypervisor.child_vp import ChildVp
from rootvisor.kvm import abi

LIMIT = child_vp._LOST_LIMIT
GIVEN_UP, TOLD = "given up", "told"


class Vp(SimpleNamespace):
    """The part of a VP that `ChildVp._memory_fault` uses."""

    def __init__(self) -> None:
        run = memoryview(bytearray(4096))
        super().__init__(
            u8=run, u64=run.cast("Q"), _lost=0, _lost_at=b"",
            translations=SimpleNamespace(forget=lambda: None),
            _give_up=lambda _why: GIVEN_UP, _memory_message=lambda _found: TOLD,
        )  # fmt: skip

    def fault(self) -> Any:
        return ChildVp._memory_fault(self)  # type: ignore[arg-type]


@pytest.fixture
def vp() -> Vp:
    return Vp()


def blame(monkeypatch: pytest.MonkeyPatch, found: object) -> None:
    monkeypatch.setattr(memory_access, "find", lambda _vp: found)


def test_failure_without_a_page_to_blame_is_given_up_after_a_while(
    vp: Vp, monkeypatch: pytest.MonkeyPatch
) -> None:
    blame(monkeypatch, None)
    assert [vp.fault() for _ in range(LIMIT)] == [child_vp._GO_ON] * (LIMIT - 1) + [GIVEN_UP]


def test_instruction_that_gets_on_is_not_given_up(vp: Vp, monkeypatch: pytest.MonkeyPatch) -> None:
    """REP STOS over pages that another VP has just had mapped: RIP stays, RCX does not."""
    blame(monkeypatch, None)
    for count in range(3 * LIMIT):
        vp.u64[abi.SYNC_REGS_AT // 8 + 2] = count
        assert vp.fault() == child_vp._GO_ON


def test_failures_are_counted_anew_after_one_with_a_page(vp: Vp, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        blame(monkeypatch, None)
        assert {vp.fault() for _ in range(LIMIT - 1)} == {child_vp._GO_ON}
        blame(monkeypatch, SimpleNamespace(access=0, operand=None))
        assert vp.fault() == TOLD
