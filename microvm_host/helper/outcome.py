# SPDX-License-Identifier: MIT
"""What went wrong in a verb, as words for the journal and an exit code for systemd."""

from __future__ import annotations

from .. import log
from ..errors import EXIT_CONFIG, EXIT_FAILED, MicrovmHostError, NameInvalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def carried_out(call: Callable[[], int | None], verb: str, name: str) -> int:
    """Call it; what goes wrong is told under the VM's name. Gives the exit code."""
    try:
        return call() or 0
    except MicrovmHostError as error:
        log.status(str(error))
        log.error(str(error), vm=name)
        # A name that was read, not typed, is wrong in a file.
        return EXIT_CONFIG if isinstance(error, NameInvalid) else error.exit_code
    except OSError as error:
        log.error(f"{error.filename or verb}: {error.strerror}", vm=name)
        return EXIT_FAILED
    except Exception:
        # A mistake of ours. There is no standard error that would show it.
        from traceback import format_exc

        for line in format_exc().splitlines():
            log.error(line, vm=name)
        return EXIT_FAILED
