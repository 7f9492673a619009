# SPDX-License-Identifier: Apache-2.0
"""Which engine runs the root partition: this machine's KVM, or the appliance (KVM inside an emulated
machine).

The presence of /dev/kvm says little: a nested or emulated KVM can fail on the first instruction, or hang. So
a self-test runs unmodified ring-0 code in a process of its own, under a deadline; its verdict is kept until
the next boot of this machine or a change of /dev/kvm.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import rootvisor
from rootvisor.boot.whole_file import write_whole
from rootvisor.cli.errors import UserError
from rootvisor.cli.paths import cache_dir, source_root

KVM_DEVICE = "/dev/kvm"
SELFTEST_DEADLINE_S = 20.0

_SELFTEST = (
    "import sys; sys.path.insert(0, sys.argv[1]); from rootvisor.kvm.selftest import main; sys.exit(main())"
)


@dataclass(frozen=True, slots=True)
class KvmVerdict:
    """Whether KVM can run an unmodified kernel here, why (not), and what it offers."""

    usable: bool
    reason: str
    mend: str = ""
    capabilities: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """The engine of a run: `kvm` or `appliance`, and the reason for it."""

    name: str
    reason: str


def choose_engine(wanted: str) -> EngineChoice:
    """The engine for `--engine auto|kvm|appliance`; `UserError` when KVM is demanded and cannot do it."""
    if wanted == "appliance":
        return EngineChoice("appliance", "--engine appliance")
    verdict = kvm_verdict()
    if verdict.usable:
        return EngineChoice("kvm", verdict.reason)
    if wanted == "kvm":
        mend = f"{verdict.mend}, or use --engine appliance" if verdict.mend else "use --engine appliance"
        raise UserError(f"KVM cannot run the root partition here: {verdict.reason}", mend)
    return EngineChoice("appliance", f"no usable KVM: {verdict.reason}")


def kvm_verdict(use_cache: bool = True) -> KvmVerdict:
    """The verdict on this machine's KVM: by a look at /dev/kvm, then the kept or a new self-test."""
    refusal = _device_refusal()
    if refusal is not None:
        return refusal
    path = cache_dir() / "engine" / f"{_verdict_key()}.json"
    if use_cache:
        kept = _read_verdict(path)
        if kept is not None:
            return kept
    verdict = _run_selftest()
    _keep_verdict(path, verdict)
    return verdict


def _device_refusal() -> KvmVerdict | None:
    """What already a look at /dev/kvm forbids."""
    if not os.path.exists(KVM_DEVICE):
        return KvmVerdict(
            False, f"there is no {KVM_DEVICE}", "load the module (modprobe kvm-intel or kvm-amd)"
        )
    try:
        os.close(os.open(KVM_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except PermissionError:
        return KvmVerdict(
            False,
            f"cannot open {KVM_DEVICE}: permission denied",
            "join its group (sudo usermod -aG kvm $USER, then log in again)",
        )
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        return KvmVerdict(
            False,
            f"cannot open {KVM_DEVICE}: {reason}",
            "enable virtualisation in the firmware, or its nesting",
        )
    return None


def _verdict_key() -> str:
    """A name that changes when the verdict may: boot, kernel, device, interpreter, our own version."""
    device = os.stat(KVM_DEVICE)
    parts = (
        _boot_id(),
        os.uname().release,
        f"{device.st_rdev:x}:{device.st_mode:o}:{device.st_uid}:{device.st_gid}",
        str(os.geteuid()),
        sys.version,
        rootvisor.__version__,
        *_selftest_state(),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]


def _selftest_state() -> tuple[str, ...]:
    """Time stamps of the processor package: a changed self-test (development tree, update) is run again."""
    folder = source_root() / "rootvisor" / "kvm"
    return tuple(f"{path.name}:{path.stat().st_mtime_ns}" for path in sorted(folder.glob("*.py")))


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _read_verdict(path: Path) -> KvmVerdict | None:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return KvmVerdict(
            bool(fields["usable"]),
            str(fields["reason"]),
            str(fields.get("mend", "")),
            dict(fields["capabilities"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep_verdict(path: Path, verdict: KvmVerdict) -> None:
    """Keep a verdict; a cache that cannot be written costs only time at the next run."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob("*.json"):
            old.unlink(missing_ok=True)
        write_whole(str(path), json.dumps(asdict(verdict)).encode())
    except OSError:
        pass


def _run_selftest() -> KvmVerdict:
    """Run the self-test in a process group of its own; a KVM that hangs is a KVM that cannot be used."""
    argv = [sys.executable, "-I", "-S", "-X", "utf8", "-c", _SELFTEST, str(source_root())]
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    try:
        output, complaint = process.communicate(timeout=SELFTEST_DEADLINE_S)
    except subprocess.TimeoutExpired:
        _kill_group(process)
        return KvmVerdict(False, f"its self-test did not end within {SELFTEST_DEADLINE_S:.0f} s")
    except BaseException:
        _kill_group(process)
        raise
    lines = output.strip().splitlines()
    try:
        fields = json.loads(lines[-1])
        return KvmVerdict(
            usable=bool(fields["usable"]),
            reason=str(fields["reason"]),
            mend=str(fields.get("mend", "")),
            capabilities=dict(fields.get("capabilities") or {}),
        )
    except (IndexError, ValueError, KeyError, TypeError):
        if process.returncode < 0:
            why = f"was killed by {signal.Signals(-process.returncode).name}"
        else:
            last = complaint.strip().splitlines()
            why = f"ended with status {process.returncode}" + (f" ({last[-1]})" if last else "")
        return KvmVerdict(False, f"its self-test {why}")


def _kill_group(process: subprocess.Popen[str]) -> None:
    """Kill the self-test; a process stuck in the kernel is not waited for."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    try:
        process.communicate(timeout=2.0)
    except subprocess.TimeoutExpired:
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
