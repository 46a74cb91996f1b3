# SPDX-License-Identifier: MIT
"""Runs inside the test host and times what it is told to: `python3 -IS probe.py < JOB > RESULT`.

Here and not outside, so that entering the host is no part of any figure. A job names ways of doing
the same work; they are done by turns, so that whatever else the machine does meets both alike.
Imports nothing of the project.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

SETTLES_WITHIN = 120.0  # seconds


def call(argv: list[str]) -> tuple[float, float]:
    """Run a program with its output thrown away; gives seconds, and what CPU it took itself."""
    null = os.open(os.devnull, os.O_RDWR)
    actions = [(os.POSIX_SPAWN_DUP2, null, number) for number in (0, 1)]
    begin = time.perf_counter()
    child = os.posix_spawnp(argv[0], argv, os.environ, file_actions=actions)
    _, status, usage = os.wait4(child, 0)
    took = time.perf_counter() - begin
    os.close(null)
    if status:
        sys.exit(f"probe: {argv[:6]} failed with {os.waitstatus_to_exitcode(status)}")
    return took, usage.ru_utime + usage.ru_stime


def systemd_cpu() -> float:
    """Seconds of CPU that PID 1 has used, with the children that it has waited for."""
    with open("/proc/1/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def pss(process: str) -> int:
    """What a process holds in memory, in kB, shared pages by its part of them."""
    try:
        with open(f"{process}/smaps_rollup", encoding="ascii") as file:
            for line in file:
                if line.startswith("Pss:"):
                    return int(line.split()[1])
    except OSError:
        # It has ended.
        pass
    return 0


def processes() -> dict[int, str]:
    """Process id -> name, of all."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/comm", encoding="utf-8", errors="replace") as file:
                    found[int(entry)] = file.read().strip()
            except OSError:
                pass
    return found


def settle() -> None:
    """Wait until systemd has nothing left to do."""
    deadline = time.monotonic() + SETTLES_WITHIN
    while True:
        with os.popen("systemctl list-jobs --no-legend --no-pager --plain") as pipe:
            if not [line for line in pipe if line[:1].isdigit()]:
                break
        if time.monotonic() > deadline:
            sys.exit("probe: systemd's jobs do not come to an end")
        time.sleep(0.02)
    # Its children are reaped, and the kernel's own leftovers of links and groups are gone.
    time.sleep(0.05)


def times(job: dict[str, Any]) -> dict[str, Any]:
    """Time each way, in turns; `before` and `after` are not part of it."""
    results: dict[str, Any] = {
        name: {"seconds": [], "cpu": [], "systemd_cpu": 0.0} for name in job["ways"]
    }
    names = list(job["ways"])
    for number in range(job["rounds"] + job.get("warm_ups", 1)):
        # Whoever comes second finds what the first has left in the caches.
        for name in names if number % 2 else reversed(names):
            way, result = job["ways"][name], results[name]
            for argv in way.get("before", ()):
                call(argv)
            if job.get("settle"):
                settle()
            began = systemd_cpu()
            took, cpu = call(way["timed"])
            for argv in way.get("after", ()):
                call(argv)
            if job.get("settle"):
                settle()
            if number >= job.get("warm_ups", 1):
                result["seconds"].append(took)
                result["cpu"].append(cpu)
                result["systemd_cpu"] += systemd_cpu() - began
    return results


def memory(job: dict[str, Any]) -> dict[str, dict[str, list[int]]]:
    """PSS, in kB, of the processes that are there after `before`, by name; undone by `after`."""
    results: dict[str, dict[str, list[int]]] = {}
    for name, way in job["ways"].items():
        settle()
        there = set(processes())
        for argv in way["before"]:
            call(argv)
        settle()
        # The guests connect meanwhile.
        time.sleep(1)
        found: dict[str, list[int]] = {}
        results[name] = found
        for pid, command in processes().items():
            if pid not in there:
                found.setdefault(command, []).append(pss(f"/proc/{pid}"))
        for argv in way["after"]:
            call(argv)
    return results


def boot(argv: list[str], directory: str) -> dict[str, float]:
    """Run a hypervisor with the test guest in it, and kill it when that is ready.

    Gives seconds until the guest's first process says something, its memory in MB as it says, and
    the hypervisor's in kB.
    """
    reader, writer = os.pipe()
    begin = time.perf_counter()
    child = os.fork()
    if not child:
        os.chdir(directory)
        null = os.open(os.devnull, os.O_RDONLY)
        for old, new in ((null, 0), (writer, 1)):
            os.dup2(old, new)
        os.execvp(argv[0], argv)
    os.close(writer)
    found: dict[str, float] = {}
    try:
        with open(reader, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if "GUEST" not in line:
                    continue
                found.setdefault("boots", time.perf_counter() - begin)
                words = line.split()
                if "memory" in words:
                    found["memory"] = float(words[words.index("memory") + 1])
                if words[-1] == "ready":
                    found["pss"] = pss(f"/proc/{child}")
                    return found
        sys.exit(f"probe: the guest of {argv[:4]} did not get ready")
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def boots(job: dict[str, Any]) -> dict[str, list[dict[str, float]]]:
    """Boot each way's guest, in turns; the first time of each does not count."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in job["ways"]}
    for number in range(job["rounds"] + 1):
        for name in job["ways"] if number % 2 else reversed(job["ways"]):
            way = job["ways"][name]
            found = boot(way["argv"], way["directory"])
            if number:
                results[name].append(found)
    return results


def main() -> None:
    """The entry point."""
    job = json.load(sys.stdin)
    found: object
    match job["kind"]:
        case "times":
            found = times(job)
        case "memory":
            found = memory(job)
        case "boots":
            found = boots(job)
    json.dump(found, sys.stdout)


main()
