# SPDX-License-Identifier: Apache-2.0
"""What benches need before they measure: engine, folder, and command lines of machines that start where the engine
is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rootvisor.bench.outer import BenchError, RootRequest
from rootvisor.cli.bench_report import Measured
from rootvisor.cli.description import RunOptions
from rootvisor.cli.engine import EngineChoice, choose_engine
from rootvisor.cli.errors import UserError
from rootvisor.cli.kernel_choice import cached_kernel
from rootvisor.cli.launch import argv_in_folder
from rootvisor.cli.output import Progress
from rootvisor.cli.prepare import Standard, prepare, python_argv
from rootvisor.cli.run_folder import run_folder
from rootvisor.peers.errors import PeerError
from rootvisor.peers.qemu import ensure


@dataclass(frozen=True, slots=True)
class Preparation:
    """The engine of a bench, a folder for it, and who is told of progress."""

    engine: EngineChoice
    folder: Path
    progress: Progress

    @property
    def in_appliance(self) -> bool:
        """Whether the inner part runs in the appliance."""
        return self.engine.name == "appliance"

    def machine_argv(self, options: RunOptions, name: str) -> list[str]:
        """The words that start this machine where the engine is; its files are in a new folder `name`."""
        plan = prepare(options, progress=self.progress, standard=Standard(False, False))
        place = self.folder / name
        place.mkdir()
        return argv_in_folder(plan, place)


@contextmanager
def preparation(engine: str) -> Iterator[Preparation]:
    """Engine and folder, for as long as the bench runs. A bench that cannot run is a `UserError`."""
    with Progress() as progress, run_folder() as folder:
        try:
            yield Preparation(choose_engine(engine), folder, progress)
        except BenchError as error:
            raise UserError(str(error), error.mend) from error


def measure_in_root(
    engine: str,
    root_mib: int,
    runs: int,
    measure: Callable[[Preparation, RootRequest], dict[str, Any]],
) -> Measured:
    """A bench in a root partition of the kernel mshv, with QEMU beside where it is to be had."""
    with preparation(engine) as ready:
        kernel = cached_kernel("mshv", ready.progress)
        qemu, problem = None, None
        try:
            qemu = str(ensure(ready.progress).program)
        except PeerError as error:
            problem = str(error)

        def root_argv(command: Sequence[str]) -> list[str]:
            options = RunOptions(
                kernel="mshv", memory_bytes=root_mib << 20, engine=ready.engine.name, command=tuple(command)
            )
            return ready.machine_argv(options, "root")

        request = RootRequest(
            kernel=kernel,
            qemu=qemu,
            qemu_problem=problem,
            runs=runs,
            python=python_argv(),
            root_argv=root_argv,
        )
        return Measured(ready.engine, measure(ready, request), f"{kernel.name} {kernel.version}")
