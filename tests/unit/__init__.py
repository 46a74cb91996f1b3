# SPDX-License-Identifier: MIT
"""Tests of single modules: without root, systemd or a network."""
