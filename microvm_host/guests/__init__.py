# SPDX-License-Identifier: MIT
"""Guests that `microvm init` makes of the host's own packages, so that there is one to run at once.

They are files of the host like any others that a declaration names, and nothing else of the
toolkit asks who made them.
"""
