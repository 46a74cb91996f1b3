# SPDX-License-Identifier: MIT
"""Tests, test hosts and the demonstration."""
