# SPDX-License-Identifier: MIT
"""The verbs that the units call: `helper VERB NAME`.

Each verb is one short function that imports just what it needs: these run between `systemctl
start` and the hypervisor, where every import counts. Nothing here is for people to call.
"""
