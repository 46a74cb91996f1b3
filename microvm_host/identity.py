# SPDX-License-Identifier: MIT
"""Whom a VM runs as."""

from __future__ import annotations

from .frozen import frozen


@frozen
class Identity:
    """The user and group of a VM's hypervisor, whose taps, nodes and sockets they are.

    `groups` are those that the unit gives it beside that group and the user's own memberships.
    """

    user: str
    uid: int
    group: str
    gid: int
    groups: tuple[int, ...] = ()
