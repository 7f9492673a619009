# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from rootvisor.bench import guest_code
from rootvisor.bench.outer import compile_program
from rootvisor.hypervisor.hypercall_abi import PAGE_CODE, PORT

SOURCE = Path(guest_code.__file__).with_name("exit_loop.c")


def test_init_has_marker_and_power_off() -> None:
    program = guest_code.init_program()
    assert program.startswith(b"\x7fELF")
    assert program.endswith(guest_code.MARKER + b"\n")
    assert struct.pack("<I", 0x4321FEDC) in program
    assert program in guest_code.initramfs()


def test_exit_image_has_code_and_hypercall_page_in_place() -> None:
    image = guest_code.exit_image(2, 3)
    assert len(image) == guest_code.RAM
    code = guest_code.exit_loop(2, 3)
    assert image[guest_code.ENTRY :].startswith(code)
    assert image[guest_code.HYPERCALL_GPA :].startswith(PAGE_CODE)
    assert len(code) < guest_code.RAM - guest_code.ENTRY


def test_backward_jumps_of_the_exit_loop_meet_their_targets() -> None:
    code = guest_code.exit_loop(2, 3)
    start = code.index(b"\xb0\x00\xe6")  # the first mark
    jump = code.index(b"\x0f\x85")
    assert jump + 6 + struct.unpack_from("<i", code, jump + 2)[0] == start


def test_c_loop_has_the_same_numbers() -> None:
    text = SOURCE.read_text(encoding="utf-8") + SOURCE.with_name("kvm_processor.h").read_text(
        encoding="utf-8"
    )
    names = dict(re.findall(r"\b([A-Z_]+) = (0x[0-9A-Fa-f]+|\d+)", text))
    assert int(names["HYPERCALL_PORT"], 0) == PORT
    for name in ("MARK_PORT", "END_MARK", "ENTRY", "STACK", "PAGE_TABLE"):
        assert int(names[name], 0) == getattr(guest_code, name)
    assert guest_code.KINDS[int(names["HYPERCALLS_BEGIN"])] == "hypercall"


def test_c_loop_compiles_without_warnings(tmp_path: Path) -> None:
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("gcc is missing; apt-get install gcc libc6-dev")
    subprocess.run(
        [gcc, "-Wall", "-Wextra", "-Werror", "-O2", "-fsyntax-only", str(SOURCE)], check=True, timeout=60
    )
    program, problem = compile_program(tmp_path, "exit_loop")
    assert problem is None
    assert program is not None


def test_no_compiler_is_a_reason_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    program, problem = compile_program(tmp_path, "exit_loop")
    assert program is None
    assert problem is not None
    assert "gcc is missing" in problem
