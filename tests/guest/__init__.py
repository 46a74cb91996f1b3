# SPDX-License-Identifier: MIT
"""A small real guest and the runner packages that start it.

What a test needs on the far side of the contract: ``image`` makes a kernel and an initrd out of a
Debian tree, ``init`` is what runs in that guest and tells on the console what it sees, ``package``
writes runner packages. Nothing here imports ``microvm_host``: what makes packages and what runs
them meet only in the package's directory. Standard library only, and importable from a bare copy
of this directory, since the test hosts run it too.
"""
