# SPDX-License-Identifier: MIT
"""The ready-made network of VMs."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .paths import HostPaths

BRIDGE = "mvbr0"


def bridge_is_there(host: HostPaths) -> bool:
    return os.path.isdir(f"{host.net_device(BRIDGE)}/bridge")
