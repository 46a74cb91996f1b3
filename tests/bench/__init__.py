# SPDX-License-Identifier: MIT
"""The toolkit measured beside the plain way of doing the same work: `make bench`."""
