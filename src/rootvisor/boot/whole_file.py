# SPDX-License-Identifier: Apache-2.0
"""Files of the cache that several runs may write at once: each replaces them whole."""

from __future__ import annotations

import os
import tempfile


def write_whole(path: str, content: bytes) -> None:
    """Write a file that everybody may read, whole or not at all. OSError: no room, no permission.

    What a killed process leaves has the file's name behind a dot, and more behind that.
    """
    folder, name = os.path.split(path)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
