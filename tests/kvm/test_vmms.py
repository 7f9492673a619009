# SPDX-License-Identifier: Apache-2.0
"""VMMs that are killed, come and go, are many, or still run when the root ends; the hypervisor's process is looked at
from outside: threads, mappings, descriptors.

ROOTVISOR_KILLS, ROOTVISOR_CYCLES, ROOTVISOR_FILL_MIB: how many, and how much of its memory each of sixteen guests fills
(scripts/kill-vmms and `make soak` take 200, 500 and 120).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.children import code, guests_at_work
from tests.children.assembler import write_images
from tests.kvm.command import DEADLINE_S, RUN

KILLS = int(os.environ.get("ROOTVISOR_KILLS", "10"))
FILL_MIB = int(os.environ.get("ROOTVISOR_FILL_MIB", "16"))
CYCLES = int(os.environ.get("ROOTVISOR_CYCLES", "25"))
SEED = int(os.environ.get("ROOTVISOR_FUZZ_SEED", "20261127"))
VMMS = Path(__file__).resolve().parents[1] / "children" / "vmms.py"
#: Bytes that the interpreter may hold back.
MEMORY_LIMIT = 4 << 20
RESERVATION = 1 << 33
assert guests_at_work.DONE in code.ALL


class Inventory:
    """What a hypervisor process has, as far as children add to it."""

    def __init__(self, pid: int) -> None:
        proc = Path(f"/proc/{pid}")
        self.threads = len(os.listdir(proc / "task"))
        links = []
        for entry in os.scandir(proc / "fd"):
            try:
                links.append(re.sub(r"\d+", "N", os.readlink(entry.path)))
            except OSError:
                continue
        self.descriptors = Counter(links)
        lines = (proc / "maps").read_text().splitlines()
        self.processors = sum("kvm-vcpu" in line for line in lines)
        self.reservations = 0
        for line in lines:
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            self.reservations += end - start >= RESERVATION
        self.mappings = len(lines)
        status = (proc / "status").read_text()
        self.memory = int(re.search(r"^RssAnon:\s+(\d+)", status, re.MULTILINE)[1]) << 10  # type: ignore[index]

    def counted(self) -> dict[str, Any]:
        return {
            "threads": self.threads, "descriptors": dict(sorted(self.descriptors.items())),
            "processors": self.processors, "reservations": self.reservations,
        }  # fmt: skip


class Root:
    """``rootvisor run`` with vmms.py in it."""

    def __init__(self, folder: Path, *what: str, options: tuple[str, ...] = (), shell: str = "") -> None:
        images, self.report = folder / "images", folder / "report"
        write_images(code.ALL, images)
        python = getattr(sys, "_base_executable", sys.executable)
        command = [python, "-I", "-S", str(VMMS), str(images), *what]
        if shell:
            command = ["sh", "-c", f'"$@"; {shell}', "sh", *command]
        self.process = subprocess.Popen(
            [
                *RUN, "--kernel", "mshv", "--vps", "2", "--timeout", "3000", *options,
                "--report", str(self.report), "--", *command,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )  # fmt: skip
        self.said: list[str] = []

    def line(self) -> str:
        """The next line; the empty string at the end."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().rstrip("\n")
        self.said.append(line)
        return line

    def until(self, word: str) -> str:
        """The next line with that word, which must come."""
        while word not in (line := self.line()):
            assert line, f"the end came before {word!r}: {self.end()}"
        return line

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> tuple[int, str]:
        """Status and stderr."""
        try:
            out, err = self.process.communicate(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            out, err = self.process.communicate()
            pytest.fail(f"the root does not end: {self.said[-3:]} {out[-1000:]} {err[-1000:]}")
        self.said += out.splitlines()
        return self.process.returncode, err + (
            "" if self.process.returncode == 0 else "\n".join(self.said[-5:])
        )

    def settled(self, wanted: Inventory) -> Inventory:
        """The process, when it has what it had, or after a while."""
        deadline = time.monotonic() + 30
        while (now := Inventory(self.process.pid)).counted() != wanted.counted():
            if time.monotonic() > deadline:
                assert now.counted() == wanted.counted()
            time.sleep(0.05)
        return now

    def facts(self) -> dict[str, Any]:
        return dict(json.loads(self.report.read_text()))

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):  # a line for a root that is gone
                stream.close()


@pytest.fixture
def roots(tmp_path: Path) -> Iterator[Any]:
    made: list[Root] = []

    def make(*what: str, options: tuple[str, ...] = (), shell: str = "") -> Root:
        made.append(Root(tmp_path, *what, options=options, shell=shell))
        return made[-1]

    yield make
    for root in made:
        root.close()


def check_accounts(root: Root) -> None:
    facts = root.facts()
    assert facts["children"] == 0
    deposits = facts["deposits"]
    assert (deposits["of_children"], deposits["lost"], deposits["accesses"]) == (0, 0, 0), deposits


def figure_at_end(root: Root) -> str:
    """What the program says of itself at last; the root has ended well, and all accounts are even."""
    figure = root.until("figure").partition(" ")[2]
    status, errors = root.end()
    assert (status, errors) == (0, ""), errors
    check_accounts(root)
    return figure


@pytest.mark.timeout(3300)
@pytest.mark.parametrize("scheduler", ["hypervisor", "root"])
def test_killed_vmms_leave_nothing_behind(
    roots: Any, scheduler: str, capsys: pytest.CaptureFixture[str], record_property: Any
) -> None:
    root = roots("kills", str(KILLS), str(SEED), options=("--scheduler", scheduler, "--watch-deposits"))
    root.until("ready?")
    before = Inventory(root.process.pid)
    assert (before.processors, before.reservations) == (2 + 2, before.reservations)
    mappings = before.mappings
    root.go_on()
    for _ in range(KILLS):
        root.until("killed ")
        now = root.settled(before)
        mappings = max(mappings, now.mappings)
        root.go_on()
    figure = figure_at_end(root)
    grown = now.memory - before.memory
    figure += f"; mappings {before.mappings}, at most {mappings}; memory {grown >> 10:+} KiB"
    record_property("kills", figure)
    with capsys.disabled():
        print(f" {figure}", flush=True)
    assert mappings <= before.mappings + 32
    assert grown < MEMORY_LIMIT


@pytest.mark.timeout(3300)
@pytest.mark.parametrize("scheduler", ["hypervisor", "root"])
def test_partitions_come_and_go_without_growth_of_the_hypervisor(
    roots: Any, scheduler: str, capsys: pytest.CaptureFixture[str], record_property: Any
) -> None:
    root = roots("cycles", str(CYCLES), options=("--scheduler", scheduler))
    root.until("ready?")
    before = Inventory(root.process.pid)
    root.go_on()
    done = 0
    while done < CYCLES:
        done = int(root.until("cycles ").split()[1].rstrip("?"))
        now = root.settled(before)
        root.go_on()
    figure = figure_at_end(root)
    grown = now.memory - before.memory
    figure += f"; mappings {now.mappings - before.mappings:+}, memory {grown >> 10:+} KiB"
    record_property("cycles", figure)
    with capsys.disabled():
        print(f" {figure}", flush=True)
    assert grown < MEMORY_LIMIT
    assert now.mappings <= before.mappings + 32


@pytest.mark.timeout(1800)
def test_sixteen_children_of_128_mib_work_at_once(
    roots: Any, capsys: pytest.CaptureFixture[str], record_property: Any
) -> None:
    root = roots("many", "16", str(FILL_MIB), options=("--memory", "2560M"))
    root.until("all are there?")
    deadline = time.monotonic() + DEADLINE_S
    while Inventory(root.process.pid).processors != 2 + 16:  # a partition is there before its VP
        assert time.monotonic() < deadline
        time.sleep(0.1)
    root.go_on()
    figure = figure_at_end(root)
    record_property("many", figure)
    with capsys.disabled():
        print(f" {figure}", flush=True)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("scheduler", ["hypervisor", "root"])
@pytest.mark.parametrize(
    ("action", "expected", "ended"),
    [
        ("exit 7", 7, "poweroff"),
        ("poweroff; sleep 100", 0, "poweroff"),
        ("reboot; sleep 100", 122, "reset"),
        ("echo c >/proc/sysrq-trigger", 123, "crash"),
    ],
)
def test_root_that_ends_with_children_at_work_ends_cleanly(
    roots: Any, scheduler: str, action: str, expected: int, ended: str
) -> None:
    root = roots("leave", "3", options=("--scheduler", scheduler), shell=action)
    root.until("at work")
    status, errors = root.end()
    assert status == expected, errors
    assert "Traceback" not in errors
    if expected != 123:
        assert not [line for line in errors.splitlines() if line.startswith("rootvisor:")], errors
    facts = root.facts()
    assert facts["ended"] == ended
    assert not os.path.exists(f"/proc/{root.process.pid}")
