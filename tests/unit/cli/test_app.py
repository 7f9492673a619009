# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rootvisor.cli import app, prepare
from rootvisor.cli.errors import UserError, error_chain

Run = Callable[..., tuple[int, str, str]]
SOURCE = Path(app.__file__).parents[2]


def test_help_lists_every_command(rootvisor: Run) -> None:
    status, out, err = rootvisor("--help")
    assert (status, err) == (0, "")
    for name in app._COMMANDS:
        assert f"\n  {name} " in out


def test_every_command_has_help(rootvisor: Run) -> None:
    for name in app._COMMANDS:
        status, out, _ = rootvisor(name, "--help")
        assert status == 0
        assert out.startswith(f"Usage: rootvisor {name}")


def test_no_arguments_show_help(rootvisor: Run) -> None:
    status, out, err = rootvisor()
    assert "Commands:" in out + err
    assert status in (0, 2)  # 2 from click 8.2 on


def test_version(rootvisor: Run) -> None:
    status, out, _ = rootvisor("--version")
    assert status == 0
    assert out.startswith("rootvisor, version ")


def test_unknown_command_is_one_line(rootvisor: Run) -> None:
    status, _, err = rootvisor("fly")
    assert status == 2
    assert err.count("\n") == 1


def test_unexpected_exception_is_one_line(
    rootvisor: Run, bzimage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_wanted: str) -> None:
        raise RuntimeError("the\nmoon") from ValueError("is cheese")

    monkeypatch.setattr(prepare, "choose_engine", fail)
    status, out, err = rootvisor("run", "--kernel", str(bzimage))
    assert (status, out) == (125, "")
    assert (
        err
        == "rootvisor: internal error: RuntimeError: the moon: is cheese; run with --debug for the traceback\n"
    )
    status, _, err = rootvisor("run", "--debug", "--kernel", str(bzimage))
    assert status == 125
    assert "Traceback" in err


def test_ctrl_c_is_status_130(rootvisor: Run, bzimage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_wanted: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "choose_engine", interrupt)
    status, _, err = rootvisor("run", "--kernel", str(bzimage))
    assert (status, err) == (130, "rootvisor: interrupted\n")


def test_error_is_message_then_mend() -> None:
    assert str(UserError("it broke", "mend it")) == "it broke; mend it"
    assert str(UserError("it broke")) == "it broke"


def test_error_chain_names_each_cause_once() -> None:
    try:
        try:
            raise OSError(2, "gone")
        except OSError as cause:
            raise RuntimeError("cannot boot") from cause
    except RuntimeError as error:
        assert error_chain(error) == "cannot boot: [Errno 2] gone"


def test_closed_stdout_is_no_error() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "rootvisor", "run", "--help"],
            stdout=write_end,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(SOURCE)},
            check=False,
            timeout=60,
        )
    finally:
        os.close(write_end)
    assert done.stderr == b""
    assert done.returncode == 141


@pytest.mark.parametrize(
    ("words", "expected"),
    [("rootvisor ru", "run"), ("rootvisor run --ker", "--kernel"), ("rootvisor run --kernel ms", "mshv")],
)
def test_shell_completion_offers_commands_options_and_values(words: str, expected: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rootvisor"],
        env={
            **os.environ,
            "PYTHONPATH": str(SOURCE),
            "_ROOTVISOR_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert f"plain,{expected}\n" in done.stdout
