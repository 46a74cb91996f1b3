# SPDX-License-Identifier: MIT
"""The `microvm` command. Presentation only: what it shows and does, the other modules know."""
