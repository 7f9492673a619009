# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rootvisor.vmm import agent_run

FAKE_GUEST = Path(__file__).with_name("fake_guest.py")
DEADLINE_S = 60


def guest(*arguments: str) -> tuple[int, str]:
    """Exit status and stderr of a scenario."""
    done = subprocess.run(
        [sys.executable, str(FAKE_GUEST), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr


def test_status_of_the_command_is_the_status() -> None:
    assert guest("exit-7") == (7, "")


def test_guest_that_powers_off_without_a_status_has_done_well() -> None:
    assert guest("poweroff") == (0, "")


def test_agent_that_cannot_go_on_says_why() -> None:
    assert guest("agent-error") == (125, "rootvisor: cannot mount root\n")


def test_crash_has_a_status_of_its_own_and_shows_the_console() -> None:
    status, err = guest("crash")
    assert status == agent_run.STATUS_CRASH
    assert "kernel crashed" in err
    assert "the guest's last line" in err


@pytest.mark.parametrize(
    ("scenario", "status"),
    [("reset", agent_run.STATUS_RESET), ("triple-fault", agent_run.STATUS_TRIPLE_FAULT)],
)
def test_other_ends_are_told_apart(scenario: str, status: int) -> None:
    assert guest(scenario)[0] == status


def test_statuses_differ() -> None:
    own = [value for name, value in vars(agent_run).items() if name.startswith("STATUS_")]
    assert len(set(own)) == len(own)


def test_machine_that_cannot_be_made_is_one_line() -> None:
    status, err = guest("refused")
    assert (status, err.count("\n")) == (125, 1)
    assert "apt-get install virtiofsd" in err


@pytest.mark.parametrize(
    ("scenario", "text"), [("runs", "did not end in time"), ("hangs", "did not reach user space in time")]
)
def test_guest_that_does_not_end_meets_the_timeout(scenario: str, text: str) -> None:
    status, err = guest(scenario, "1")
    assert status == 124
    assert text in err


def started(scenario: str) -> subprocess.Popen[str]:
    """A scenario once it takes signals: then SIGPWR is caught (SigCgt in /proc/PID/status)."""
    process = subprocess.Popen(
        [sys.executable, str(FAKE_GUEST), scenario],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:") and int(line.split()[1], 16) >> (signal.SIGPWR - 1) & 1:
                return process
        time.sleep(0.01)
    process.kill()
    pytest.fail("the guest takes no signals")


def test_interrupt_ends_a_guest_that_has_no_user_space_yet() -> None:
    process = started("hangs")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130, err


def test_first_interrupt_is_for_the_command() -> None:
    process = started("runs")
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, err) == (42, "")  # what the fake command says when it is told `signal INT`


def test_power_button_asks_the_agent() -> None:
    process = started("hangs")
    process.send_signal(signal.SIGPWR)
    _, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, err) == (99, "")  # what the fake command says when it is told `poweroff`
