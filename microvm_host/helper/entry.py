# SPDX-License-Identifier: MIT
"""The entry point: finds the verb, and has it done."""

from __future__ import annotations

import os

from .. import log, names
from ..errors import EXIT_USAGE, NameInvalid
from ..paths import PROGRAM_PLACES, HostPaths
from .outcome import carried_out

# The module that has a verb, which is loaded when it is called, and the function there.
VERBS = {
    "set-booted": ("booting", "set_booted"),
    "unset-booted": ("booting", "unset_booted"),
    "tap-interfaces-up": ("setup", "taps_up"),
    "tap-interfaces-down": ("setup", "taps_down"),
    "macvtap-interfaces-up": ("setup", "macvtaps_up"),
    "macvtap-interfaces-down": ("setup", "macvtaps_down"),
    "pci-devices-up": ("setup", "pci_up"),
    "pci-devices-down": ("setup", "pci_down"),
    "pci-devices-down-again": ("setup", "pci_down_again"),
    "virtiofsd-up": ("setup", "shares_up"),
    "virtiofsd-down": ("setup", "shares_down"),
    "start": ("running", "start"),
    "register": ("besides", "register"),
    "stop": ("running", "stop"),
    "guard": ("ending", "guard"),
    "ended": ("ending", "ended"),
    "again": ("again", "again"),
    "again-over": ("again", "over"),
    "install": ("besides", "install"),
}
# These execute programs of the package, which have the unit's UMask=.
_BECOME_OTHERS = ("start", "stop")
# These are called with the instance of a share's unit in place of a VM's name.
SHARE_VERBS = {"share-lost": ("ending", "share_lost")}


# What systemd itself puts there, and who runs as root beside the hypervisor goes by.
_OF_SYSTEMD = ("NOTIFY_SOCKET", "INVOCATION_ID", "JOURNAL_STREAM", "MAINPID") + (
    "SERVICE_RESULT",
    "EXIT_CODE",
    "EXIT_STATUS",
)


def clean_environment(verb: list[str]) -> None:
    """Forget what an installed helper must not go by, before anything is read from it.

    The VM's unit may have EnvironmentFile= of the VM's user. What the dynamic loader heeds has
    been taken away by UnsetEnvironment= of the unit.
    """
    # For tests.
    os.environ.pop("MICROVM_HOST_ROOT", None)
    if verb == ["ended"]:
        for key in {*os.environ} - {*_OF_SYSTEMD}:
            if not key.startswith("MICROVM_"):
                del os.environ[key]
        os.environ["PATH"] = ":".join(PROGRAM_PLACES)


def main(argv: list[str]) -> int:
    """Run one verb; gives the exit code."""
    if len(argv) != 3 or argv[1] not in (*VERBS, *SHARE_VERBS):
        log.error(f"usage: helper VERB NAME, with VERB one of {', '.join((*VERBS, *SHARE_VERBS))}")
        return EXIT_USAGE
    verb, host = argv[1], HostPaths.from_environment()
    try:
        name, tag = names.share_of(argv[2]) if verb in SHARE_VERBS else (argv[2], "")
        names.vm_name(name)
    except NameInvalid as error:
        # Not for the VM's unit: there is no such VM.
        log.error(str(error))
        return EXIT_USAGE
    if os.geteuid() == 0 and verb not in _BECOME_OTHERS:
        # Records must be readable by the VM's user, whatever UMask= is for that user's own files.
        os.umask(0o022)
    module, function = SHARE_VERBS.get(verb) or VERBS[verb]
    # importlib would have to be loaded.
    call = getattr(__import__(module, globals(), None, (function,), 1), function)
    if verb in SHARE_VERBS:
        return carried_out(lambda: call(name, tag, host), verb, name)
    return carried_out(lambda: call(name, host), verb, name)
