# SPDX-License-Identifier: MIT
"""What systemd says of a VM's own service, to root: whom it runs as, its times, what it waits for.

Asked at each start and stop, and therefore over `bus`.
"""

from __future__ import annotations

from . import bus, names
from .errors import MicrovmHostError
from .identity import Identity
from .paths import HostPaths

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# USEC_INFINITY, as systemd's properties have it.
_INFINITY = 2**64 - 1


def properties(name: str, *wanted: bus.Property) -> list[Any]:
    """Properties of the service of a VM, as bus.properties gives them; raises MicrovmHostError."""
    return unit_properties(names.unit(name), *wanted)


def unit_properties(unit: str, *wanted: bus.Property) -> list[Any]:
    """Properties of a unit, which need not be the VM's service but the one in the foreground."""
    return bus.properties(_private_socket(), bus.unit(unit), *wanted)


def identity(name: str) -> Identity:
    """Whom the hypervisor of a VM will run as, drop-ins of its unit included.

    Raises:
        MicrovmHostError: systemd does not answer, or the user or group does not exist.
    """
    import grp
    import pwd

    unit = names.unit(name)
    user, group, further, is_dynamic = properties(
        name,
        ("Service", "User"),
        ("Service", "Group"),
        ("Service", "SupplementaryGroups"),
        ("Service", "DynamicUser"),
    )
    if is_dynamic:
        raise MicrovmHostError(
            f"{unit} has DynamicUser=yes, so nobody knows yet who will own its devices",
            hint="give it a User= that exists",
        )
    user = user or "root"
    try:
        account = pwd.getpwuid(int(user)) if user.isdigit() else pwd.getpwnam(user)
    except KeyError as error:
        raise MicrovmHostError(
            f"{unit} runs as user {user!r}, who does not exist",
            hint="create the user, or mend User= in the unit's drop-in",
        ) from error
    gid = account.pw_gid

    def number(group: str, key: str) -> int:
        try:
            return int(group) if group.isdigit() else grp.getgrnam(group).gr_gid
        except KeyError as error:
            raise no_group(group, key) from error

    def no_group(group: str, key: str) -> MicrovmHostError:
        return MicrovmHostError(
            f"{unit} runs as group {group!r}, which does not exist",
            hint=f"create the group, or correct {key}= in the unit's drop-in",
        )

    if group:
        gid = number(group, "Group")
    try:
        group = grp.getgrgid(gid).gr_name
    except KeyError as error:
        raise no_group(str(gid), "Group") from error
    groups = {account.pw_gid, *(number(each, "SupplementaryGroups") for each in further)} - {gid}
    return Identity(account.pw_name, account.pw_uid, group, gid, tuple(sorted(groups)))


def start_timeout(name: str) -> float | None:
    """Seconds until systemd gives up the start of a VM (TimeoutStartSec=); None is never.

    Raises:
        MicrovmHostError: systemd does not answer.
    """
    (microseconds,) = properties(name, ("Service", "TimeoutStartUSec"))
    return None if microseconds == _INFINITY else int(microseconds) / 1e6


def stop_timeout(name: str) -> float:
    """Seconds that a stop of a VM may take (TimeoutStopSec=); infinite if that is not bounded.

    Raises:
        MicrovmHostError: systemd does not answer.
    """
    return unit_stop_timeout(names.unit(name))


def unit_stop_timeout(unit: str) -> float:
    """The same of any service."""
    (microseconds,) = unit_properties(unit, ("Service", "TimeoutStopUSec"))
    return float("inf") if microseconds == _INFINITY else int(microseconds) / 1e6


def stopping_for(name: str) -> float:
    """Seconds since the stop of a VM began, 0 if none has; raises MicrovmHostError."""
    import time

    state, since = properties(
        name, ("Unit", "ActiveState"), ("Unit", "StateChangeTimestampMonotonic")
    )
    if state != "deactivating":
        return 0.0
    return max(0.0, time.clock_gettime(time.CLOCK_MONOTONIC) - int(since) / 1e6)


def ran(name: str) -> float:
    """Seconds since the main process of a VM began; raises MicrovmHostError."""
    import time

    (began,) = properties(name, ("Service", "ExecMainStartTimestampMonotonic"))
    return time.clock_gettime(time.CLOCK_MONOTONIC) - int(began) / 1e6


def pending_job(name: str) -> tuple[str, str] | None:
    """Type (`stop`, `start`, …) and state (`waiting`, `running`) of the job that a VM has.

    Raises:
        MicrovmHostError: systemd does not answer.
    """
    return unit_job(names.unit(name))


def is_busy(unit: str) -> bool:
    """Whether a unit is on its way up or down; raises MicrovmHostError."""
    state, (job, _) = unit_properties(unit, ("Unit", "ActiveState"), ("Unit", "Job"))
    return bool(job) or state not in ("active", "inactive", "failed")


def unit_job(unit: str) -> tuple[str, str] | None:
    """The same of any unit."""
    # One that comes to its end between the questions may have made room for another.
    for _ in range(2):
        ((number, job),) = unit_properties(unit, ("Unit", "Job"))
        if not number:
            return None
        try:
            kind, state = bus.properties(
                _private_socket(), job, ("Job", "JobType"), ("Job", "State")
            )
        except bus.Refused as error:
            if not error.is_gone:
                raise
        else:
            return kind, state
    return None


def environment(unit: str) -> tuple[list[str], list[str], list[str]]:
    """What systemd makes the environment of a service's processes of.

    Returns:
        Assignments, of systemd's own environment and of Environment=; files of such, which may be
        globs; and names, or whole assignments, that are left out of it all.

    Raises:
        MicrovmHostError: systemd does not answer.
    """
    (own,) = bus.properties(_private_socket(), bus.MANAGER, ("Manager", "Environment"))
    given, files, unset = unit_properties(
        unit,
        ("Service", "Environment"),
        ("Service", "EnvironmentFiles"),
        ("Service", "UnsetEnvironment"),
    )
    return [*own, *given], [path for path, _ in files], unset


def _private_socket() -> str:
    return HostPaths.from_environment().systemd_private_socket
