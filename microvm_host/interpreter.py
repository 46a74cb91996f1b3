# SPDX-License-Identifier: MIT
"""Makes the distribution's Python packages importable where they are needed.

The toolkit's programs run `python3 -I -S`: isolated from the caller's environment, and without
`site`, which looks through all package directories at each start.
"""

from __future__ import annotations

import sys


def add_distribution_packages() -> None:
    """Do what `site` does at an ordinary start, once."""
    if "site" not in sys.modules:
        import site

        # With -S the import alone does nothing.
        site.main()
