# SPDX-License-Identifier: MIT
"""Makes the distribution's Python packages importable where they are needed.

The toolkit's programs run `python3 -I -S`: isolated from the caller's environment, and without
`site`, which looks through all package directories at each start.
"""

from __future__ import annotations

import sys


def add_distribution_packages() -> None:
    """Put the distribution's package directories on the path, once.

    What `site` does at an ordinary start, without running the .pth files in them, which would
    take as long as all else.
    """
    if "site" not in sys.modules:
        import site

        # With -S the import alone does nothing.
        sys.path += site.getsitepackages()
