# SPDX-License-Identifier: MIT
"""What VMs, interfaces, shares and PCI devices may be called, and the names made from them.

Each check takes untrusted text and gives back the name to use, or raises NameInvalid with the
value and the rule that it breaks. A name is never cut short, expanded or mended. No regular
expressions: importing `re` costs as long as all of a helper's own work.
"""

from __future__ import annotations

from .errors import NameInvalid

_DIGITS = frozenset("0123456789")
_HEX = _DIGITS | frozenset("abcdef")
_ALPHANUMERIC = _DIGITS | frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
# What a unit's instance name may hold unescaped (systemd.unit(5)), less `@` and `\`.
_VM_NAME = _ALPHANUMERIC | frozenset(":_.-")

_PLAIN = frozenset("0123456789abcdefghijklmnopqrstuvwxyz_-")
_USER_NAME = _ALPHANUMERIC | frozenset("_-")
_OWN_USER = "microvm-"

# A host name's limit (RFC 1035): the guest is likely to be called the same.
VM_NAME_MAX = 63
# hostname(7), with its domain.
HOST_NAME_MAX = 253
# IFNAMSIZ of linux/if.h is 16, with the final NUL.
INTERFACE_NAME_MAX = 15
# virtio 1.2, 5.11.4: the tag is a field of 36 bytes.
TAG_MAX = 36

# The strictest rule of what reads user names: systemd.io/USER_NAMES, and utmp's 32 bytes.
USER_NAME_MAX = 31

_FILE_NAME = _ALPHANUMERIC | frozenset("_.-")
# NAME_MAX of linux/limits.h.
FILE_NAME_MAX = 255

# What IPv4 needs, and the most that the kernel gives a tap.
MTU_MIN, MTU_MAX = 68, 65521
# sockaddr_un of unix(7) has 108 bytes, with the final NUL.
_SOCKET_PATH_MAX = 107

MACVTAP_MODES = ("private", "vepa", "bridge", "passthru", "source")


def is_number(text: str) -> bool:
    """Whether a text is a number as programs write one: plain digits, and not too many."""
    return 0 < len(text) <= 20 and _DIGITS.issuperset(text)


def vm_name(text: str) -> str:
    """Check the name of a VM, which is a directory and a unit's instance at once."""
    if not text:
        raise NameInvalid("the name of a VM is empty")
    vm = text.removeprefix("microvm@").removesuffix(".service")
    if text.startswith("microvm@") and vm and _VM_NAME.issuperset(vm):
        raise NameInvalid(f"{text!r} is a unit, not the name of a VM", hint=f"did you mean {vm}?")
    if not _VM_NAME.issuperset(text) or text[0] in ".-":
        raise NameInvalid(
            f"{text!r} cannot be the name of a VM",
            hint="letters, digits, ':', '_', '.' and '-' can, not beginning with '.' or '-'",
        )
    if len(text) > VM_NAME_MAX:
        raise NameInvalid(f"the VM's name {text!r} is longer than {VM_NAME_MAX} characters")
    return text


def user_name(text: str) -> str:
    """Check the name of a user of the host, by the strict rule that systemd has for new ones."""
    if not text or text[0] in _DIGITS or text[0] == "-" or not _USER_NAME.issuperset(text):
        raise NameInvalid(
            f"{text!r} cannot be the name of a user",
            hint="letters, digits, '_' and '-' can, not beginning with a digit or '-'",
        )
    if len(text) > USER_NAME_MAX:
        raise NameInvalid(f"the user's name {text!r} is longer than {USER_NAME_MAX} characters")
    return text


def guest_user_name(text: str) -> str:
    """Check the name of a user or a group of a guest, by the rule of Debian's adduser(8)."""
    if not _PLAIN.issuperset(text) or text[:1] in "-0123456789" or len(text) > USER_NAME_MAX:
        raise NameInvalid(
            f"{text[:80]!r} cannot be the name of a guest's user or group",
            hint=f"at most {USER_NAME_MAX} of a to z, digits, '_' and '-' can, beginning with a "
            "letter or '_'",
        )
    return text


def is_host_name(text: str) -> bool:
    """Whether a text can be a host name, with its domain or without (hostname(7))."""
    allowed = _ALPHANUMERIC | {"-"}
    return len(text) <= HOST_NAME_MAX and all(
        0 < len(part) <= VM_NAME_MAX and allowed.issuperset(part) and "-" not in (part[0], part[-1])
        for part in text.split(".")
    )


def own_user(vm: str) -> str:
    """The name of the system user that is a VM's alone.

    `microvm-web` for the VM `web`. A name that is too long for that, or holds what a user's may
    not, is cut short and told from others by as much of its SHA-256 as fits: all 31 characters
    are used then, and never without, so that the two kinds do not meet.
    """
    if _PLAIN.issuperset(vm) and len(_OWN_USER) + len(vm) < USER_NAME_MAX:
        return f"{_OWN_USER}{vm}"
    from hashlib import sha256  # not for all the others

    beginning = "".join(each if each in _PLAIN else "_" for each in vm.lower()[:12])
    return f"{_OWN_USER}{beginning}-{sha256(vm.encode()).hexdigest()}"[:USER_NAME_MAX]


def is_vm_name(text: str) -> bool:
    """Whether a VM may be called so."""
    try:
        vm_name(text)
    except NameInvalid:
        return False
    return True


def is_socket_path(path: str) -> bool:
    """Whether a socket can have this path, as far as its length goes."""
    return len(path.encode()) <= _SOCKET_PATH_MAX


def interface_name(text: str) -> str:
    """Check the name of a network interface (the kernel's dev_valid_name(), and no `%`)."""
    if not text:
        raise NameInvalid("an interface name is empty")
    if text in (".", "..") or not text.isprintable():
        raise NameInvalid(f"{text!r} cannot be an interface name")
    if len(text.encode()) > INTERFACE_NAME_MAX:
        raise NameInvalid(
            f"interface name {text!r} is longer than {INTERFACE_NAME_MAX} bytes",
            hint="the kernel would cut it short",
        )
    # `%d` would make the kernel pick a number: the interface would have another name.
    for character in "/ :%":
        if character in text:
            raise NameInvalid(f"interface name {text!r} holds {character!r}")
    return text


def is_interface_name(text: str) -> bool:
    """Whether a network interface may be called so."""
    try:
        interface_name(text)
    except NameInvalid:
        return False
    return True


def share_tag(text: str) -> str:
    """Check a virtiofs tag, which may nest by `/`."""
    if not text or not text.isprintable():
        raise NameInvalid(f"{text!r} cannot be a share's tag")
    if any(part in ("", ".", "..") for part in text.split("/")):
        raise NameInvalid(
            f"the share's tag {text!r} has an empty, '.' or '..' part",
            hint="a tag may nest, but not leave its directory",
        )
    if len(text.encode()) > TAG_MAX:
        raise NameInvalid(f"the share's tag {text!r} is longer than {TAG_MAX} bytes")
    return text


def mac_address(text: str) -> str:
    """Check a MAC address of a guest; gives it in lower case."""
    parts = text.lower().split(":")
    if len(parts) != 6 or not all(len(part) == 2 and _HEX.issuperset(part) for part in parts):
        raise NameInvalid(f"{text!r} is not a MAC address", hint="it looks like 02:00:00:00:00:01")
    if int(parts[0], 16) & 1:
        raise NameInvalid(f"MAC address {text!r} is a multicast address")
    if set(parts) == {"00"}:
        raise NameInvalid(f"MAC address {text!r} is all zeroes")
    return ":".join(parts)


def mtu(text: str) -> int:
    """Check the MTU of a tap or macvtap."""
    if not (text.isascii() and text.isdecimal() and MTU_MIN <= int(text[:6]) <= MTU_MAX):
        raise NameInvalid(f"{text!r} is not an MTU: a number between {MTU_MIN} and {MTU_MAX}")
    return int(text)


def pci_address(text: str) -> str:
    """Check a PCI address or a glob of one; gives it in full and in lower case.

    `01:00.1` gives `0000:01:00.1`; each field may be `*` (`*:02:00.0`), and a domain may have
    five digits, as Intel's VMD gives them.
    """
    invalid = NameInvalid(
        f"{text!r} is not a PCI address", hint="it looks like 0000:01:00.0, as lspci -D prints it"
    )
    fields = text.lower().split(":")
    if len(fields) == 2:
        fields.insert(0, "0000")
    if len(fields) != 3:
        raise invalid
    domain, bus, device_function = fields
    device, dot, function = device_function.partition(".")
    if not dot:
        raise invalid
    for field, lengths, largest in (
        (domain, (4, 5), 0xFFFFF),
        (bus, (2,), 0xFF),
        (device, (2,), 0x1F),
        (function, (1,), 7),
    ):
        if field == "*":
            continue
        if len(field) not in lengths or not _HEX.issuperset(field) or int(field, 16) > largest:
            raise invalid
    return f"{domain}:{bus}:{device}.{function}"


def machine_uuid(text: str) -> str:
    """Check a UUID; gives it in lower case with its dashes."""
    digits = text.lower().replace("-", "")
    if len(digits) != 32 or not _HEX.issuperset(digits) or text.count("-") not in (0, 4):
        raise NameInvalid(f"{text!r} is not a UUID")
    parts = (digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])
    whole = "-".join(parts)
    if "-" in text and text.lower() != whole:
        raise NameInvalid(f"{text!r} is not a UUID")
    return whole


def file_name(text: str) -> str:
    """Check the name of a file that is made for a VM; plain, so that it is one word anywhere."""
    if not _FILE_NAME.issuperset(text) or text[:1] in ("", ".") or len(text) > FILE_NAME_MAX:
        raise NameInvalid(
            f"{text[:80]!r} cannot be the name of a file here",
            hint="letters, digits, '-', '_' and '.' can, not beginning with '.'",
        )
    return text


def escape(text: str) -> str:
    """Escape text for a unit's name as systemd-escape(1) does (systemd.unit(5))."""
    escaped = []
    for position, byte in enumerate(text.encode()):
        character = chr(byte)
        if character == "/":
            escaped.append("-")
        elif character in _ALPHANUMERIC or character in ":_" or (character == "." and position):
            escaped.append(character)
        else:
            escaped.append(f"\\x{byte:02x}")
    return "".join(escaped)


def unescape(text: str) -> str:
    """Undo `escape`; raises NameInvalid for what it never gives."""
    first, *others = text.replace("-", "/").split("\\x")
    try:
        found = first.encode() + b"".join(
            bytes.fromhex(other[:2]) + other[2:].encode() for other in others
        )
        plain = found.decode()
    except ValueError:
        plain = ""
    if escape(plain) != text:
        raise NameInvalid(f"{text!r} is not an escaped name")
    return plain


def unit(name: str) -> str:
    """The unit that runs a VM. Names of VMs need no escaping."""
    return f"microvm@{name}.service"


# Units that set something up for a VM and undo it after, by the part before `@NAME.service`.
SET_UP_UNITS = (
    "microvm-set-booted",
    "microvm-tap-interfaces",
    "microvm-macvtap-interfaces",
    "microvm-pci-devices",
    "microvm-virtiofsd",
)


def set_up_units(name: str) -> list[str]:
    """The units that set up what a VM needs; `*` gives globs for those of all VMs."""
    return [f"{unit}@{name}.service" for unit in SET_UP_UNITS]


def guard_unit(name: str) -> str:
    """The unit that sees to it that the stop of a VM ends."""
    return f"microvm-guard@{name}.service"


def set_up_target(name: str) -> str:
    """The unit that stands for all of these."""
    return f"microvm-set-up@{name}.target"


def undo_unit(name: str) -> str:
    """The unit that is reached when one of them did not come up."""
    return f"microvm-undo@{name}.target"


def again_unit(name: str) -> str:
    """The unit that starts a VM anew when that has happened in an automatic restart."""
    return f"microvm-again@{name}.service"


def foreground_unit(name: str) -> str:
    """The transient unit of `microvm run`."""
    return f"microvm-foreground-{escape(name)}.service"


_SHARE_UNIT = "microvm-virtiofsd-"
_SHARE_LOST_UNIT = "microvm-share-lost@"


def own_share_unit(name: str) -> str:
    """The transient unit of a package's own virtiofsd-run."""
    return f"{_SHARE_UNIT}{escape(name)}.service"


def share_unit(name: str, tag: str, suffix: str) -> str:
    """The transient unit of one share; `suffix` is `.socket` or `.service`.

    Escaped names hold no bare `-`, so that the VM `a` with the tag `b-c` and the VM `a-b` with the
    tag `c` do not meet in one name.
    """
    return f"{_SHARE_UNIT}{escape(name)}-{escape(tag)}{suffix}"


def vm_of_share_unit(unit: str) -> str | None:
    """The VM that a unit of shares is of; None for a unit of another name.

    Takes those of `share_unit`, `own_share_unit` and `share_lost_unit`.
    """
    name, _, suffix = unit.rpartition(".")
    for prefix, suffixes in (
        (_SHARE_UNIT, ("socket", "service")),
        (_SHARE_LOST_UNIT, ("service", "timer", "path")),
    ):
        if suffix in suffixes and name.startswith(prefix):
            break
    else:
        return None
    first, dash, second = name.removeprefix(prefix).partition("-")
    # A tag may nest, which escapes to a `-`.
    try:
        vm, tag = unescape(first), unescape(second)
    except NameInvalid:
        return None
    return vm if is_vm_name(vm) and bool(tag) == bool(dash) else None


def share_lost_unit(name: str, tag: str = "", suffix: str = ".service") -> str:
    """The unit that tells of a lost share, or of all of a package's own script without a tag.

    `suffix` is `.service`, or `.timer` and `.path` for what starts that.
    """
    instance = f"{escape(name)}-{escape(tag)}" if tag else escape(name)
    return f"{_SHARE_LOST_UNIT}{instance}{suffix}"


def share_of(instance: str) -> tuple[str, str]:
    """The VM and the tag, or none, that the instance of such a unit stands for.

    Raises:
        NameInvalid: it stands for nothing of the kind.
    """
    name, dash, tag = instance.partition("-")
    return vm_name(unescape(name)), share_tag(unescape(tag)) if dash else ""
