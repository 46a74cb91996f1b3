# SPDX-License-Identifier: MIT
"""Fuzzing of everything that root reads, and of what guests and hypervisors say to it.

That is packages, declarations, records, names, state directories, answers on control sockets, event
logs, notifications, what systemctl and machined answer, and lists of devices and mounts.

`make fuzz` runs a million inputs, `make check` some hundreds of each target, the same each time.
Inputs are kept ones (`corpus/TARGET/`), changed at random but with knowledge of what they consist
of: files of a tree, lines, and words that mean something. Whatever reaches a line of code for the
first time is changed further. What counts as a finding stands in `engine`; how to add a target,
in `targets`.

Own code, and not one of the known fuzzers: those want a compiler or a Python without which the
toolkit is to be tested, hypothesis makes a thousandth of the inputs in the same time, and what an
input is here is a tree of files.
"""
