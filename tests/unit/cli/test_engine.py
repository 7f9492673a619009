# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rootvisor.cli import engine
from rootvisor.cli.engine import KvmVerdict, choose_engine
from rootvisor.cli.errors import UserError

_ORIGINAL = engine.kvm_verdict


def _verdict(monkeypatch: pytest.MonkeyPatch, verdict: KvmVerdict) -> None:
    monkeypatch.setattr(engine, "kvm_verdict", lambda use_cache=True: verdict)


def _selftest(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    monkeypatch.setattr(engine, "kvm_verdict", _ORIGINAL)
    monkeypatch.setattr(engine, "_device_refusal", lambda: None)
    monkeypatch.setattr(engine, "KVM_DEVICE", "/dev/null")
    monkeypatch.setattr(engine, "_SELFTEST", program)


def test_auto_takes_kvm_when_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    _verdict(monkeypatch, KvmVerdict(True, "fine"))
    assert choose_engine("auto").name == "kvm"
    assert choose_engine("appliance").name == "appliance"


def test_auto_takes_the_appliance_when_kvm_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    _verdict(monkeypatch, KvmVerdict(False, "it hangs"))
    choice = choose_engine("auto")
    assert (choice.name, "it hangs" in choice.reason) == ("appliance", True)


def test_kvm_that_does_not_work_is_refused_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    _verdict(monkeypatch, KvmVerdict(False, "permission denied", "join the group"))
    with pytest.raises(UserError, match="join the group, or use --engine appliance") as caught:
        choose_engine("kvm")
    assert caught.value.status == 125


def test_missing_device_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "kvm_verdict", _ORIGINAL)
    monkeypatch.setattr(engine, "KVM_DEVICE", "/dev/no-such-kvm")
    verdict = engine.kvm_verdict()
    assert (verdict.usable, verdict.reason) == (False, "there is no /dev/no-such-kvm")


def test_verdict_of_the_selftest_is_kept(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    answer = json.dumps({"usable": True, "reason": "fine", "capabilities": {"max_vcpus": 64}})
    _selftest(monkeypatch, f"print({answer!r})")
    assert engine.kvm_verdict() == KvmVerdict(True, "fine", "", {"max_vcpus": 64})
    assert len(list((own_cache / "engine").iterdir())) == 1
    monkeypatch.setattr(engine, "_SELFTEST", "raise SystemExit(1)")
    assert engine.kvm_verdict().usable
    assert not engine.kvm_verdict(use_cache=False).usable


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
        ("import sys; sys.exit('no such ioctl')", r"status 1 \(no such ioctl\)"),
        ("print('{')", "status 0"),
        ("print('[]')", "status 0"),
    ],
)
def test_selftest_that_fails_is_a_verdict(monkeypatch: pytest.MonkeyPatch, program: str, reason: str) -> None:
    _selftest(monkeypatch, program)
    verdict = engine.kvm_verdict()
    assert not verdict.usable
    assert re.search(reason, verdict.reason)


def test_selftest_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    _selftest(monkeypatch, "import time; time.sleep(600)")
    monkeypatch.setattr(engine, "SELFTEST_DEADLINE_S", 0.3)
    assert "did not end" in engine.kvm_verdict().reason


def test_cache_that_cannot_be_written_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _selftest(monkeypatch, 'print(\'{"usable": true, "reason": "fine"}\')')
    monkeypatch.setenv("ROOTVISOR_CACHE", "/proc/no-cache")
    assert engine.kvm_verdict().usable
