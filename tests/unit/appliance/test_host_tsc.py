# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import mmap
import os

import pytest

from rootvisor.appliance import host_tsc
from rootvisor.appliance.host_tsc import TscMeasurement

on_x86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="there is no TSC")


@on_x86
def test_khz_two_measurements_agree_better_than_kvm_demands() -> None:
    first, second = TscMeasurement().khz(), TscMeasurement().khz()
    assert first is not None and second is not None
    assert abs(first - second) / first < 250e-6


def test_khz_without_executable_memory_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_words: object, **_options: object) -> None:
        raise PermissionError

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert TscMeasurement().khz() is None


@on_x86
def test_khz_of_a_counter_that_stands_still_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_tsc, "_CODE", bytes.fromhex("31c0 c3"))  # xor eax,eax; ret
    assert TscMeasurement().khz() is None
