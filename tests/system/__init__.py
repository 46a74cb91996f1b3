# SPDX-License-Identifier: MIT
"""Tests of the installed toolkit, on test hosts: real systemd, taps, virtiofsd and QEMU."""
