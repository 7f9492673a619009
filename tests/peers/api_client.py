# SPDX-License-Identifier: Apache-2.0
"""The program that drives a VMM by an unmodified client of Cloud Hypervisor's API, built once and kept in the cache."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from rootvisor.cli.paths import cache_dir

_SOURCE = Path(__file__).with_name("cloud_hypervisor_client")
_BUILD_SECONDS = 1500


class CannotBuild(Exception):
    """Why there is no program, in one line."""


def api_client() -> Path:
    """The program's path. CannotBuild when there is no cargo here, or it cannot fetch the crate."""
    sources = [_SOURCE / "Cargo.toml", _SOURCE / "src" / "main.rs"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    program = cache_dir() / "peers" / f"cloud-hypervisor-client-{digest}"
    if program.exists():
        return program
    cargo = shutil.which("cargo")
    if cargo is None:
        raise CannotBuild("no cargo here: a Rust of 1.86 or newer builds the client")
    program.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=program.parent) as folder:
        copy = shutil.copytree(
            _SOURCE, Path(folder) / "source"
        )  # cargo writes its lock file next to the source
        done = subprocess.run(
            [cargo, "build", "--quiet", "--target-dir", f"{folder}/target"],
            cwd=copy,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_BUILD_SECONDS,
            check=False,
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
            raise CannotBuild(f"cargo cannot build the client: {(lines or ['no reason given'])[0]}")
        Path(folder, "target", "debug", "cloud-hypervisor-client-peer").rename(program)
    return program
