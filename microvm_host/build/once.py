# SPDX-License-Identifier: MIT
"""A declaration's `extraArgs`, for hypervisors that take each option once (clap, argh).

Beside the builder's own options, they would make a command line that no start survives.
"""

from __future__ import annotations

from ..frozen import frozen
from .refused import Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from ..declaration.guest import Guest
    from ..declaration.locate import Path
    from .shell import Word, Words

# By which key something is said that the builder has an option for.
_KEYS = {
    "--api-socket": "socket",
    "--api-sock": "socket",
    "--socket": "socket",
    "--cpus": "vcpu",
    "--memory": "mem",
    "--mem": "mem",
    "--kernel": "kernel",
    "--initramfs": "initrd",
    "--initrd": "initrd",
    "--cmdline": "kernelParams",
    "--balloon": "balloon",
    "--vsock": "vsock.cid",
}
# Options that count how often they are there.
_COUNTED = ("-v",)


@frozen
class Option:
    """An option of extraArgs with its values; `number` is that of its word there."""

    name: str
    values: tuple[str, ...]
    number: int


def given(guest: Guest) -> tuple[Option, ...]:
    """The options of the guest's extraArgs, in order; raises Refused for a word that is none's."""
    found: list[Option] = []
    for number, word in enumerate(guest.extra_arguments):
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            if not found:
                raise Refused(
                    _at(guest, number), f"{_key(guest)} begins with {word!r}, which is no option"
                )
            last = found[-1]
            found[-1] = Option(last.name, (*last.values, word), last.number)
        else:
            found.append(Option(name, (value,) if equals else (), number))
    return tuple(found)


def merged(
    guest: Guest,
    ours: Iterable[str | Word],
    *,
    repeated: Collection[str] | None = None,
    listed: Collection[str] = (),
    joined: Collection[str] = (),
    replaced: Collection[str] = (),
) -> Words:
    """The builder's own options and the guest's extraArgs, as one command line.

    Args:
        ours: the builder's, each option followed by its values.
        repeated: those of the builder's that may be there several times, as may others; None for
            a hypervisor that has none of these.
        listed: options that take several values, one after the other.
        joined: options with one value, a list with commas.
        replaced: options that the guest's take the place of.

    Raises:
        Refused: another is there already, or twice.
    """
    groups: list[list[str | Word]] = []
    for word in ours:
        if isinstance(word, str) and word.startswith("-"):
            groups.append([word])
        else:
            groups[-1].append(word)
    known = {str(group[0]): group for group in groups if group[0] not in (repeated or ())}
    for option in given(guest):
        group = known.get(option.name)
        if group is None:
            groups.append([option.name, *option.values])
            if repeated is None and option.name not in _COUNTED:
                known[option.name] = groups[-1]
        elif option.name in listed:
            group += option.values
        elif option.name in replaced:
            group[1:] = option.values
        elif option.name in joined and len(group) == 2 and len(option.values) == 1:
            group[1] = f"{group[1]},{option.values[0]}"
        else:
            key = _KEYS.get(option.name)
            raise Refused(
                _at(guest, option.number),
                f"{_key(guest)} has {option.name}, which is there already, and "
                f"{guest.hypervisor} takes it once",
                f"say it by {key}" if key else "",
            )
    return [word for group in groups for word in group]


def refused(guest: Guest, option: Option, what: str, hint: str = "") -> Refused:
    """An error about one of the guest's options, for the builder to raise."""
    return Refused(_at(guest, option.number), f"{_key(guest)} has {option.name} {what}", hint)


def _at(guest: Guest, number: int) -> Path:
    return (guest.hypervisor, "extraArgs", number)


def _key(guest: Guest) -> str:
    return f"{guest.hypervisor}.extraArgs"
