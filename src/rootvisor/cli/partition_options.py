# SPDX-License-Identifier: Apache-2.0
"""Options that several commands take: what boots, with how many processors, where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from rootvisor.cli import options as types
from rootvisor.cli.help import option

_F = TypeVar("_F", bound=Callable[..., Any])


def kernel_option(**attributes: Any) -> Callable[[_F], _F]:
    """`--kernel`, mshv by default; `attributes` are those of `help.option`."""
    defaults: dict[str, Any] = {
        "type": types.KERNEL,
        "default": "mshv",
        "show_default": True,
        "help": "Kernel to boot: mshv, stock or a path.",
    }
    return option("--kernel", **(defaults | attributes))


def vps_option(default: int, **attributes: Any) -> Callable[[_F], _F]:
    """`--vps`: processors of the root partition."""
    help_text = "Virtual processors, 1 to 64."
    return option("--vps", type=types.VPS, default=default, show_default=True, help=help_text, **attributes)


def engine_option(**attributes: Any) -> Callable[[_F], _F]:
    """`--engine auto|kvm|appliance`."""
    defaults: dict[str, Any] = {
        "type": click.Choice(["auto", "kvm", "appliance"]),
        "default": "auto",
        "show_default": True,
        "help": "This machine's KVM, or an emulated machine that has one.",
    }
    return option("--engine", **(defaults | attributes))


def scheduler_option(**attributes: Any) -> Callable[[_F], _F]:
    """`--scheduler hypervisor|root`."""
    defaults: dict[str, Any] = {
        "type": click.Choice(["hypervisor", "root"]),
        "default": "hypervisor",
        "show_default": True,
        "help": "Who schedules child partitions' processors.",
    }
    return option("--scheduler", **(defaults | attributes))
