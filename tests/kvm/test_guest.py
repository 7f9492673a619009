# SPDX-License-Identifier: Apache-2.0
"""`rootvisor guest` and the demo, by the commands that users type: Linux in a child partition, through three layers.

All guests but one are started inside one root partition, which boots once.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import pytest

from tests.kvm.command import run_group, run_root

soak = pytest.mark.skipif(
    not os.environ.get("ROOTVISOR_SOAK"), reason="long, part of make soak: ROOTVISOR_SOAK=1 runs it"
)

ROOTVISOR = (sys.executable, "-m", "rootvisor")
DEADLINE_S = 900
BULK = hashlib.shake_256(b"guest").digest(1 << 20) * int(os.environ.get("ROOTVISOR_GUEST_BULK_MB", "4"))

#: Runs in the root partition, and tells each case's output and status apart; see `parse`.
SCRIPT = """
guest() { "$PYTHON" -m rootvisor guest "$@"; }
run_case() { name=$1; shift; "$@" >/run/out 2>/run/err; echo $? >/run/status; show "$name"; }
show() {
    for part in out err status; do
        printf '== %s %s %s\\n' "$1" "$part" "$(wc -c </run/$part)"
        cat /run/$part
        echo
    done
}
upper() { echo hi | guest -- tr a-z A-Z; }
bulk() { guest -- cat </run/bulk | sha256sum; }
cat >/run/bulk
run_case status guest -- sh -c 'exit 7'
run_case upper upper
run_case bulk bulk
run_case facts guest --vps 2 -- sh -c 'nproc; dmesg; touch /of-the-guest && ls /of-the-guest; echo to stderr >&2'
run_case kept ls /of-the-guest
run_case panic guest -- sh -c 'echo c >/proc/sysrq-trigger'
run_case reboot guest -- sh -c 'reboot; sleep 1000'
run_case missing guest -- no-such-command
run_case timeout guest --timeout 60 -- sleep 100000
"""
Case = dict[str, bytes]


def parse(output: bytes) -> dict[str, Case]:
    """Case to part to content: `== CASE PART BYTES`, then so many bytes and a line end."""
    cases: dict[str, Case] = {}
    while output:
        head, _, output = output.partition(b"\n")
        mark, name, part, size = head.decode().split()
        assert mark == "=="
        cases.setdefault(name, {})[part] = output[: int(size)]
        output = output[int(size) + 1 :]
    return cases


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    """What every case printed."""
    script = f"export PYTHON={sys.executable} PYTHONPATH={os.environ.get('PYTHONPATH', '')}\n{SCRIPT}"
    result = run_root(
        ["--kernel", "mshv", "--memory", "1G", "--", "sh", "-c", script], stdin=BULK, timeout_s=DEADLINE_S
    )
    assert result.returncode == 0, result.stderr.decode(errors="replace")[-2000:]
    return parse(result.stdout)


def status(case: Case) -> int:
    return int(case["status"])


@soak
def test_exit_status_of_the_command_passes_through(cases: dict[str, Case]) -> None:
    assert status(cases["status"]) == 7, cases["status"]["err"]
    assert cases["status"]["out"] == cases["status"]["err"] == b""


@soak
def test_standard_streams_pass_through(cases: dict[str, Case]) -> None:
    assert cases["upper"] == {"out": b"HI\n", "err": b"", "status": b"0\n"}


@soak
def test_bulk_data_comes_back_unharmed(cases: dict[str, Case]) -> None:
    assert cases["bulk"]["out"].split()[0].decode() == hashlib.sha256(BULK).hexdigest(), cases["bulk"]["err"]


@soak
def test_guest_is_a_child_with_its_processors(cases: dict[str, Case]) -> None:
    out = cases["facts"]["out"]
    assert out.splitlines()[0] == b"2", cases["facts"]["err"]
    assert b"Hypervisor detected: Microsoft Hyper-V" in out
    assert b"running as root partition" not in out
    assert cases["facts"]["err"] == b"to stderr\n"


@soak
def test_what_the_guest_writes_stays_in_it(cases: dict[str, Case]) -> None:
    assert cases["facts"]["out"].splitlines()[-1] == b"/of-the-guest"
    assert status(cases["kept"]) != 0


@soak
def test_panic_has_a_status_of_its_own_and_shows_the_console(cases: dict[str, Case]) -> None:
    assert status(cases["panic"]) == 120, cases["panic"]["err"]
    assert b"sysrq triggered crash" in cases["panic"]["err"]


@soak
def test_reboot_has_a_status_of_its_own(cases: dict[str, Case]) -> None:
    assert status(cases["reboot"]) == 119, cases["reboot"]["err"]


@soak
def test_command_that_is_not_there_is_127(cases: dict[str, Case]) -> None:
    assert status(cases["missing"]) == 127
    assert b"no-such-command: command not found" in cases["missing"]["err"]


@soak
def test_command_that_never_ends_meets_the_timeout(cases: dict[str, Case]) -> None:
    assert status(cases["timeout"]) == 124
    assert b"in time" in cases["timeout"]["err"]


def test_three_layers_from_outside_pass_streams_and_status(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    result = run_group(
        [
            *ROOTVISOR, "guest", "--engine", "kvm", "--timeout", str(DEADLINE_S - 60), "--report", str(report),
            "--", "sh", "-c", "cat; echo low >&2; exit 7",
        ],
        b"shout\n\x00\xff",
        DEADLINE_S,
    )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (7, b"shout\n\x00\xff", b"low\n")
    assert json.loads(report.read_text())["hypercalls"]["HVCALL_CREATE_PARTITION"] == 1


@soak
def test_demo_has_all_its_evidence() -> None:
    result = run_group([*ROOTVISOR, "demo", "--engine", "kvm", "--json"], b"", DEADLINE_S)
    assert result.returncode == 0, result.stdout.decode(errors="replace") + result.stderr.decode(
        errors="replace"
    )
    told = json.loads(result.stdout)
    assert told["ok"]
    assert len(told["guest_evidence"]) >= 7
    assert all(one["ok"] for one in told["evidence"] + told["guest_evidence"])
    assert told["counters"]["exits"]
