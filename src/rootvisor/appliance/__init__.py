# SPDX-License-Identifier: Apache-2.0
"""A real /dev/kvm for machines that have none that is of use.

The appliance is an emulated machine (QEMU TCG, with an emulated SVM processor) that runs the distribution's cloud
kernel with KVM. It sees the host's files through virtiofs (read-only, below a layer that is thrown away) and runs
one program in the caller's folder, with the caller's environment, standard streams and exit status.

    status = run(Request(argv=["tr", "a-z", "A-Z"], cwd=os.getcwd(), env=os.environ))
"""

from __future__ import annotations

from .errors import ApplianceError
from .request import ApplianceKernel, Request
from .runner import check, run
from .tools import Problem

__all__ = ["ApplianceError", "ApplianceKernel", "Problem", "Request", "check", "run"]
