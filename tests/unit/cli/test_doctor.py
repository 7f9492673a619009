# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rootvisor.cli import host
from rootvisor.cli.engine import KvmVerdict
from rootvisor.files import virtiofsd
from rootvisor.files.virtiofsd import FileServerError, Virtiofsd

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def complete_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has everything."""
    monkeypatch.setattr(host, "kvm_verdict", lambda use_cache=True: KvmVerdict(True, "pretended"))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(
        virtiofsd, "find", lambda: Virtiofsd("/usr/libexec/virtiofsd", rust=True, namespace=False)
    )
    monkeypatch.setattr(host, "find_header_problems", list, raising=False)
    monkeypatch.setattr(host, "BUILD_SPACE_BYTES", 1)
    monkeypatch.setattr(host, "_version", lambda path, unknown: f"{path} 1.0")


def test_complete_machine_is_ready(rootvisor: Run) -> None:
    status, out, _ = rootvisor("doctor")
    assert status == 0
    assert "Ready. Try: rootvisor demo" in out


def test_json_has_a_row_for_every_check(rootvisor: Run) -> None:
    status, out, _ = rootvisor("doctor", "--json")
    report = json.loads(out)
    assert (status, report["ok"]) == (0, True)
    assert {"kvm", "qemu", "virtiofsd", "cache", "kernel mshv"} <= {
        check["name"] for check in report["checks"]
    }


def test_machine_without_kvm_is_no_fault(rootvisor: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        host, "kvm_verdict", lambda use_cache=True: KvmVerdict(False, "there is no /dev/kvm", "load it")
    )
    status, out, _ = rootvisor("doctor")
    assert status == 0
    assert "engine appliance" in out
    assert "-> load it" in out


def test_missing_file_server_is_said_with_its_mend(rootvisor: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Virtiofsd:
        raise FileServerError("virtiofsd is missing", "apt-get install virtiofsd")

    monkeypatch.setattr(virtiofsd, "find", nowhere)
    status, out, _ = rootvisor("doctor")
    assert status == 125
    assert "apt-get install virtiofsd" in out
    assert "1 thing is missing" in out


def test_qemu_is_missing_only_where_the_appliance_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    assert host.check_qemu(needed=True).state == "missing"
    assert host.check_qemu(needed=False).state == "warning"


def test_cache_without_room_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "BUILD_SPACE_BYTES", 1 << 60)
    monkeypatch.setattr(host, "KEEP_SPACE_BYTES", 1 << 60)
    check = host.check_cache()
    assert check.state == "missing"
    assert "ROOTVISOR_CACHE" in check.mend


def test_cache_below_a_file_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ROOTVISOR_CACHE", str(tmp_path / "file" / "cache"))
    assert host.check_cache().state == "missing"
