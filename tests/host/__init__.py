# SPDX-License-Identifier: MIT
"""Throw-away systemd machines for tests, the demo and the benchmarks.

Two kinds stand behind one interface (`interface.Host`): a container host that boots in a
moment, for the daily loop, and a virtual host with a kernel, udev and an IOMMU of its own.
Both boot the same Debian root, built once and kept outside the checkout.  Nothing in this
package changes the network, the units or the files of the machine it runs on.

Only the standard library is imported here: the hosts must work before anything is installed.
"""
