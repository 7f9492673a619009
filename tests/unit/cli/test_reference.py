# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_GENERATOR = Path(__file__).resolve().parents[3] / "docs" / "reference" / "generate.py"


def test_generated_reference_pages_are_current() -> None:
    done = subprocess.run(
        [sys.executable, str(_GENERATOR), "--check"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
