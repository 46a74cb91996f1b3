# SPDX-License-Identifier: MIT
"""Runs microVM runner packages as services of any systemd distribution."""

__version__ = "0.1.0"
