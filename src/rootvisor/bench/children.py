# SPDX-License-Identifier: Apache-2.0
"""Prepares the bench of child partitions on this machine (programs, guests, jobs); `children_inner` runs it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rootvisor.bench import child_code, outer
from rootvisor.peers import job as peer_job
from rootvisor.peers.errors import PeerError

ROUNDS = 3
COUNT = 500
IDLE = 24
"""Children that do nothing, all at once."""

MACHINES = ("microvm", "q35")
GUEST_MIB = 256
ROOT_MIB = 1536
"""Memory of the root partition: its own, the guests', and a QEMU."""

_PEER_TIMEOUT_S = 180.0
_APPLIANCE_MIB = 1280
_DEADLINE_S = 1500.0


def measure(
    request: outer.RootRequest, folder: Path, *, appliance: bool, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Run the bench; `runs` is guests under QEMU on each side, `folder` is private, empty, and visible in the appliance
    and in the root partition.

    Gives the inner part's results, with `qemu`: None, or why there are no guests under QEMU. Raises
    `outer.BenchError`, also when there is no C compiler.
    """
    program, problem = outer.compile_program(folder, "child_loop", ("-pthread",))
    if program is None:
        raise outer.BenchError(f"{problem}", "the VMM that is measured is written in C")
    code, idle = folder / "image", folder / "idle_image"
    code.write_bytes(child_code.image(child_code.program(COUNT)))
    idle.write_bytes(child_code.image(child_code.idle_program()))
    loops = {side: [program, side, str(code), str(ROUNDS), str(COUNT)] for side in ("kvm", "mshv")}
    idles = {side: [program, side, str(idle), "idle", str(IDLE)] for side in ("kvm", "mshv")}
    boots = {side: _boots(request, folder, side) for side in ("kvm", "mshv")} if request.qemu else {}
    results = folder / "results.json"
    job = {
        "loops": loops,
        "idles": idles,
        "idle_count": IDLE,
        "boots": boots,
        "root_argv": request.root_argv(_in_root(loops["mshv"], idles["mshv"], boots.get("mshv"))),
        "results": str(results),
    }
    path = folder / "children.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    inner = Path(child_code.__file__).with_name("children_inner.py").resolve()
    progress("starting the appliance" if appliance else "starting")
    found = outer.run_inner(
        [*request.python, str(inner), str(path)],
        folder,
        results,
        appliance=appliance,
        memory_mib=_APPLIANCE_MIB + ROOT_MIB,
        deadline_s=_DEADLINE_S,
        progress=progress,
    )
    return found | {"qemu": request.qemu_problem}


def _in_root(*commands: Sequence[str] | None) -> list[str]:
    """One command for the root partition that runs `commands` one after the other, whatever becomes of each."""
    words: list[str] = []
    steps = []
    for command in commands:
        if command:
            first = len(words) + 1
            steps.append(" ".join(f'"${{{first + number}}}"' for number in range(len(command))))
            words += command
    return ["/bin/sh", "-c", "; ".join([*steps, "exit 0"]), "sh", *words]


def _boots(request: outer.RootRequest, folder: Path, side: str) -> list[str]:
    """The command that boots the guests under QEMU on one side. The first round only fills the page cache."""
    assert request.qemu is not None
    place = folder / side
    place.mkdir()
    times = request.runs + 1 if side == "mshv" else -(-request.runs // 2) + 1
    wanted = peer_job.Request(
        guests=peer_job.combinations([request.kernel], MACHINES, [1]),
        program=request.qemu,
        accelerator=side,
        times=times,
        memory_mib=GUEST_MIB,
        timeout_s=_PEER_TIMEOUT_S,
    )
    try:
        return peer_job.prepare(wanted, place, request.python)
    except PeerError as error:
        raise outer.BenchError(error.message, error.mend) from error
