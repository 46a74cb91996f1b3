# SPDX-License-Identifier: MIT
"""Names of PCI devices, from the distribution's pci.ids (pci.ids(5))."""

from __future__ import annotations

import re

from .errors import one_line
from .frozen import frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .paths import HostPaths
    from .pcibus import Device

# What does not belong to the section above it; comments may stand anywhere.
_NEXT_SECTION = re.compile(r"\n(?![\t#])")
# A word for each class, where the list is missing (PCI Code and ID Assignment, 1).
_KINDS = {
    0x01: "storage",
    0x02: "network",
    0x03: "display",
    0x04: "multimedia",
    0x05: "memory",
    0x06: "bridge",
    0x07: "communication",
    0x08: "system peripheral",
    0x09: "input",
    0x0B: "processor",
    0x0C: "serial bus",
    0x0D: "wireless",
    0x0F: "satellite",
    0x10: "encryption",
    0x11: "signal processing",
    0x12: "accelerator",
    0xFF: "other",
}


@frozen
class Name:
    """What a device is called; empty where the list does not say."""

    vendor: str = ""
    device: str = ""
    kind: str = ""


class Names:
    """The list, of which only what is asked for is looked at: it has 38,000 lines."""

    def __init__(self, host: HostPaths) -> None:
        self._text = ""
        self._sections: dict[str, tuple[str, str]] = {}
        for path in host.pci_ids_places():
            try:
                with open(path, encoding="utf-8", errors="replace") as source:
                    # A line break before the first line too, by which each is found.
                    self._text = f"\n{source.read()}"
            except OSError:
                continue
            break

    @property
    def are_known(self) -> bool:
        """Whether this host has the list."""
        return bool(self._text)

    def of(self, device: Device) -> Name:
        vendor, devices = self._section(f"{device.vendor_id:04x}")
        code = f"{device.class_code:06x}"
        kind, kinds = self._section(f"C {code[:2]}")
        return Name(
            vendor=vendor,
            device=_entry(devices, f"{device.device_id:04x}"),
            kind=_entry(kinds, code[2:4]) or kind or _KINDS.get(device.class_code >> 16, ""),
        )

    def _section(self, key: str) -> tuple[str, str]:
        """The name of a vendor or class, and the lines below it."""
        found = self._sections.get(key)
        if found is None:
            # Once each: the last ones are a millisecond away.
            found = self._sections[key] = self._find_section(key)
        return found

    def _find_section(self, key: str) -> tuple[str, str]:
        begin = self._text.find(f"\n{key}  ")
        if begin < 0:
            return "", ""
        end = self._text.find("\n", begin + 1)
        if end < 0:
            end = len(self._text)
        after = _NEXT_SECTION.search(self._text, end)
        name = self._text[begin + len(key) + 3 : end]
        return one_line(name), self._text[end : after.start() if after else len(self._text)]


def _entry(lines: str, key: str) -> str:
    """The name of an entry of a section; those of its subsystems are indented more."""
    begin = lines.find(f"\n\t{key}  ")
    if begin < 0:
        return ""
    return one_line(lines[begin + 2 :].split("\n", 1)[0][len(key) :])
