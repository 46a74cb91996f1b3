# SPDX-License-Identifier: MIT
"""Names of PCI devices, from the distribution's pci.ids (pci.ids(5))."""

from __future__ import annotations

from .frozen import frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .paths import HostPaths
    from .pcibus import Device


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
            kind=_entry(kinds, code[2:4]) or kind,
        )

    def _section(self, key: str) -> tuple[str, str]:
        """The name of a vendor or class, and the lines below it."""
        begin = self._text.find(f"\n{key}  ")
        if begin < 0:
            return "", ""
        end = self._text.find("\n", begin + 1)
        name = self._text[begin + len(key) + 3 : end]
        after = end
        while self._text.startswith(("\n\t", "\n#"), after):
            after = self._text.find("\n", after + 1)
            if after < 0:
                after = len(self._text)
        return name, self._text[end:after]


def _entry(lines: str, key: str) -> str:
    """The name of an entry of a section; those of its subsystems are indented more."""
    begin = lines.find(f"\n\t{key}  ")
    if begin < 0:
        return ""
    return lines[begin + 2 :].split("\n", 1)[0][len(key) :].strip()
