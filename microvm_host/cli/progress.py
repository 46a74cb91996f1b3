# SPDX-License-Identifier: MIT
"""One line on a terminal that says what is being done, and is gone when it is done."""

from __future__ import annotations

import os
import sys


class Line:
    """Writes to standard error, if that is a terminal; nothing elsewhere."""

    def __init__(self) -> None:
        self.is_seen = sys.stderr.isatty()
        self._is_shown = False

    def show(self, text: str) -> None:
        """Show a text in place of the last one; an empty one shows nothing.

        It is cut at the width of the terminal: of a text that wraps, the next one would replace
        the last line alone.
        """
        if not text:
            self.clear()
        elif self.is_seen:
            room = _width()
            # Without the last column, on which some terminals wrap.
            text = text if len(text) < room else f"{text[: room - 2]}…"
            sys.stderr.write(f"\r{text}\033[K")
            sys.stderr.flush()
            self._is_shown = True

    def clear(self) -> None:
        if self._is_shown:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
            self._is_shown = False


def _width() -> int:
    try:
        # A terminal of unknown size, such as a serial line, says 0.
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except OSError:
        return 80
