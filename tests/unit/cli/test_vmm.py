# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import rootvisor
from rootvisor.vmm.options import OPTIONS
from tests.unit.test_layers import SLOW_MODULES

Run = Callable[..., tuple[int, str, str]]
SOURCE = Path(rootvisor.__file__).parents[1]


def test_help_names_every_option_and_field(rootvisor: Run) -> None:
    status, out, _ = rootvisor("vmm", "--help")
    assert status == 0
    text = " ".join(out.split())
    for option in OPTIONS:
        assert " ".join(option.full_help.split()) in text
        assert all(name in text for name in option.names)


def test_help_is_found_among_other_options(rootvisor: Run) -> None:
    status, out, _ = rootvisor("vmm", "--kernel", "x", "-h")
    assert status == 0
    assert out.startswith("Usage: rootvisor vmm")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to do: give --kernel, --restore or --api-socket"),
        (("--zork",), "--zork: no such option"),
        (
            ("--kernel", "k", "--disk", "path=a,readonly=maybe"),
            "--disk readonly: 'maybe' is neither on nor off",
        ),
    ],
)
def test_wrong_command_line_is_one_line_and_status_2(
    rootvisor: Run, arguments: tuple[str, ...], message: str
) -> None:
    assert rootvisor("vmm", *arguments) == (2, "", f"rootvisor: {message}; see: rootvisor vmm --help\n")


def test_wrong_command_line_says_the_same_by_the_quick_way() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rootvisor", "vmm", "--zork"],
        cwd=SOURCE,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "rootvisor: --zork: no such option; see: rootvisor vmm --help\n"


def test_quick_way_imports_nothing_slow() -> None:
    """A VMM with everything but a machine: neither click nor anything that takes long in a root partition."""
    program = (
        f"import sys; sys.path.insert(0, {str(SOURCE)!r})\n"
        "from rootvisor.vmm import main\n"
        "main._Process.run = lambda process: 7\n"
        "import rootvisor.vmm.api, rootvisor.vmm.api_routes, rootvisor.vmm.events\n"
        "rootvisor.vmm.events._line(0, 'vm', 'booted', {'id': 'x'})\n"
        "from rootvisor.cli import main as command\n"
        "try: command(['vmm', '--kernel', 'k', '--disk', 'a', '--api-socket', 's'])\n"
        "except SystemExit as end: print(end.code, *sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    status, *modules = done.stdout.split()
    assert status == "7"
    assert "rootvisor.vmm.options" in modules
    assert not (SLOW_MODULES | {"click", "traceback", "socket", "threading"}) & set(modules)
