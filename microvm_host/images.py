# SPDX-License-Identifier: MIT
"""Makes the images of a VM that have content from the beginning, when its package is installed.

The package's own script makes them, as the VM's user, whose they are. A root file system holds
files that this user may not read (/etc/shadow); so the script has the right to read everything,
and no other, where that cannot be turned against the host: the user must be able neither to
exchange what the source means, nor to get at what is in it while it is read. Within the script only
mkfs uses that right (`build.volumes`).

The VM's user can trace those processes of the script that have no more rights than they. So the
script gets neither our terminal nor a session with it, which would let them type in root's name.
"""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys

from . import trust
from .errors import MicrovmHostError, one_line
from .paths import MICROVM_PREPARE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .identity import Identity
    from .trust import Suspect

# capabilities(7): reads files and searches directories, whoever may.
_READS_ALL = "-all,+dac_read_search"
# Longer than what any mkfs says in one line.
_LINE_MAX = 4096


def make(
    name: str, package: str, sources: Sequence[str], identity: Identity, directory: str
) -> None:
    """Have a package's script make what is missing; it says on our standard error how far it is.

    Args:
        sources: the directories and archives that the images are made of.
        directory: the VM's state directory.

    Raises:
        MicrovmHostError: the script failed. What it said stands above.
    """
    by = trust.suspect(identity)
    weak = [source for source in sources if not _is_out_of_reach(source, by)]
    argv = [f"{package}/{MICROVM_PREPARE}"]
    if identity.uid != 0:
        capabilities = "-all" if weak else _READS_ALL
        argv = [
            *("setpriv", f"--reuid={identity.uid}", f"--regid={identity.gid}", "--clear-groups"),
            *(f"--inh-caps={capabilities}", f"--ambient-caps={capabilities}"),
            *(f"--bounding-set={capabilities}", "--no-new-privs", "--", *argv),
        ]
    code = _run(argv, directory)
    if code:
        hint = "what it said stands above; nothing was changed"
        if weak:
            hint += (
                f"; {weak[0]} is read with the rights of {identity.user} alone, who could meddle "
                "with it meanwhile: if root is to read it, keep it in a directory that root alone "
                "may enter"
            )
        raise MicrovmHostError(
            f"the images of {name} could not be made: {MICROVM_PREPARE} ended with {code}",
            path=package,
            hint=hint,
        )


def _run(argv: list[str], directory: str) -> int:
    """Run the script away from our terminal, and print its lines; gives its exit code."""
    with subprocess.Popen(
        argv,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        umask=0o077,
        errors="replace",
    ) as script:
        assert script.stdout is not None
        try:
            # A line that never ends is cut, and nothing in it commands a terminal.
            while line := script.stdout.readline(_LINE_MAX):
                if said := one_line(line):
                    print(said, file=sys.stderr, flush=True)
            return script.wait()
        except BaseException:
            # Ctrl-C does not reach another session.
            os.killpg(script.pid, signal.SIGKILL)
            raise


def _is_out_of_reach(source: str, by: Suspect) -> bool:
    """Whether a user can change nothing of a source while it is read."""
    try:
        status = os.stat(source)
        if trust.exchangeable(source, by) or by.can_write(source, status):
            return False
    except OSError:
        # The script says that it is not there.
        return False
    if not stat.S_ISDIR(status.st_mode):
        return True
    # One closed directory on the way is enough. Mostly it is not the last one, whose mode becomes
    # that of the guest's own root.
    directory = os.path.realpath(source)
    while by.can_enter(directory, os.stat(directory)):
        if directory == "/":
            return False
        directory = os.path.dirname(directory)
    return True
