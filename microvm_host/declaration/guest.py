# SPDX-License-Identifier: MIT
"""What a declaration says of the guest, as frozen values: all checked, each default filled in.

Reads nothing but the declaration: whether a kernel is there, and what a hypervisor cannot do, is
found out by who builds.
"""

from __future__ import annotations

from os.path import normpath

from .. import names, paths
from ..errors import NameInvalid
from ..frozen import frozen
from . import claims, derived, name_of, of, read
from .schema import GUEST, OWN_TABLES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .document import Document
    from .locate import Path

# QEMU's hw/9pfs: a tag of 32 bytes with its NUL.
_TAG_9P_MAX = 31
# QEMU's own network is 10.0.2.0/24. These addresses are the network's: its first and last, and
# libslirp's gateway and name server.
_GUEST_NETWORK = "10.0.2."
_GUEST_NETWORK_OWN = ("0", "2", "3", "255")
_ANY_ADDRESS = ("", "0.0.0.0")
# In the package, shares are directories by their tags, with these in them.
_SHARE_FILES = ("source", "socket", "read-only", "cache", "posix-acl", "extra-args")


@frozen
class Volume:
    """A disk. `size` is in MiB; None where nothing is to be made."""

    image: str
    size: int | None = None
    auto_create: bool = True
    fs_type: str = "ext4"
    label: str | None = None
    mkfs_extra_args: tuple[str, ...] = ()
    image_type: str = "raw"
    read_only: bool = False
    direct: bool = False
    serial: str | None = None
    # A directory or an archive of the host that the image is made of.
    source: str | None = None

    @property
    def is_file(self) -> bool:
        """Whether it is one that could be made; not a device, and not in another's keeping."""
        return not self.image.startswith((f"{paths.DEVICES}/", "rbd:"))


@frozen
class Interface:
    """A NIC. `type` is tap, macvtap, bridge or user; `vhost` None leaves it to the host.

    `mtu` None is what the interface is joined to or on.
    """

    type: str
    id: str
    mac: str
    bridge: str | None = None
    link: str | None = None
    mode: str = "bridge"
    vhost: bool | None = None
    mtu: int | None = None

    @property
    def is_tap(self) -> bool:
        """Whether the host makes a tap for it."""
        return self.type in ("tap", "bridge")


@frozen
class Forward:
    """A port that is forwarded; from `host` to guest, or from `guest` to host."""

    source: str
    proto: str
    host_address: str
    host_port: int
    guest_address: str
    guest_port: int


@frozen
class Share:
    """A directory of the host; `socket` is None for 9p."""

    tag: str
    source: str
    proto: str = "9p"
    read_only: bool = False
    cache: str = "auto"
    posix_acl: bool = True
    socket: str | None = None
    extra_args: tuple[str, ...] = ()
    security_model: str = "none"


@frozen
class Device:
    """A device of the host. `path` is as it was written; `address` a PCI device's in full."""

    bus: str
    path: str
    address: str = ""
    qemu_id: str | None = None
    qemu_bus: str | None = None
    qemu_extra: str | None = None


@frozen
class CloudUser:
    """A user that cloud-init makes in the guest."""

    name: str
    gecos: str | None = None
    groups: tuple[str, ...] = ()
    shell: str | None = None
    sudo: str | None = None
    ssh_authorized_keys: tuple[str, ...] = ()


@frozen
class CloudInit:
    """What cloud-init is to know. The last four are files of the host, for what they replace."""

    hostname: str
    instance_id: str
    ssh_authorized_keys: tuple[str, ...] = ()
    users: tuple[CloudUser, ...] = ()
    user_data: str | None = None
    meta_data: str | None = None
    network_config: str | None = None
    vendor_data: str | None = None

    @property
    def kinds(self) -> dict[str, str]:
        """Files that say in their first line what they are, by their keys."""
        given = {"userData": self.user_data, "vendorData": self.vendor_data}
        return {key: path for key, path in given.items() if path is not None}


@frozen
class Qemu:
    """What is QEMU's alone; `machine` None is what fits the devices."""

    machine: str | None = None
    machine_opts: tuple[tuple[str, str], ...] = ()
    extra_args: tuple[str, ...] = ()
    serial_console: bool = True
    guest_agent: bool = False


@frozen
class Guest:
    """All that a declaration says of its guest. Memory is in MB."""

    name: str
    kernel: str
    machine_id: str
    hypervisor: str = "qemu"
    initrd: str | None = None
    kernel_params: tuple[str, ...] = ()
    vcpu: int = 1
    mem: int = 512
    balloon: bool = False
    deflate_on_oom: bool = True
    initial_balloon_mem: int = 0
    hotplug_mem: int = 0
    hotplugged_mem: int = 0
    cpu: str | None = None
    volumes: tuple[Volume, ...] = ()
    interfaces: tuple[Interface, ...] = ()
    forward_ports: tuple[Forward, ...] = ()
    shares: tuple[Share, ...] = ()
    devices: tuple[Device, ...] = ()
    vsock_cid: int | None = None
    readiness: str = "exec"
    # Relative to the state directory; None for none.
    socket: str | None = None
    register_with_machined: bool = False
    credential_files: tuple[tuple[str, str], ...] = ()
    # None for a guest without a seed.
    cloud_init: CloudInit | None = None
    qemu: Qemu = Qemu()
    # Further arguments that are one hypervisor's, beside QEMU's, by its name.
    own_arguments: tuple[tuple[str, tuple[str, ...]], ...] = ()
    # cloud-hypervisor's.
    oem_strings: tuple[str, ...] = ()

    @property
    def taps(self) -> tuple[Interface, ...]:
        return tuple(each for each in self.interfaces if each.is_tap)

    @property
    def macvtaps(self) -> tuple[Interface, ...]:
        return tuple(each for each in self.interfaces if each.type == "macvtap")

    @property
    def extra_arguments(self) -> tuple[str, ...]:
        """Those for the guest's own hypervisor, if that is not QEMU."""
        return dict(self.own_arguments).get(self.hypervisor, ())

    @property
    def virtiofs(self) -> tuple[Share, ...]:
        return tuple(each for each in self.shares if each.proto == "virtiofs")

    @property
    def pci_devices(self) -> tuple[Device, ...]:
        return tuple(each for each in self.devices if each.bus == "pci")

    @property
    def usb_devices(self) -> tuple[Device, ...]:
        return tuple(each for each in self.devices if each.bus == "usb")


def load(
    path: str, others: claims.Claims | None = None, host_id: str = ""
) -> tuple[Guest, Document]:
    """Read what a declaration says of its guest.

    Args:
        host_id: the host's machine-id, for what is derived from it.
        others: what the VMs of the host claim, this one included or not.

    Returns:
        The guest, and the document, which places the errors of who builds it.

    Raises:
        DeclarationError: something in it is wrong, or taken by another VM.
    """
    document = read(path)
    name = name_of(path)
    source = of(document).source
    if source.kind != "declaration":
        raise document.error(
            (source.kind,), f"says not what the guest is like: its package comes by {source.kind}"
        )
    reader = _Reader(name, document, host_id)
    guest = reader.guest()
    _check_claims(name, document, others or {}, host_id)
    return guest, document


class _Reader:
    """Makes values of one document's tables, and checks what goes beyond a single key."""

    def __init__(self, name: str, document: Document, host_id: str) -> None:
        self._name = name
        self._host_id = host_id
        self._document = document

    def guest(self) -> Guest:
        name = self._name
        guest = {key: value for key, value in self._document.table.items() if key in GUEST.keys}
        found: dict[str, Any] = GUEST.read(guest, (), self._document)
        cid = found["vsock"]["cid"]
        if cid is None and "vsock" in guest:
            cid = derived.cid(name)
        hotplug, plugged = found["hotplugMem"], found["hotpluggedMem"]
        self._check_hotplug(hotplug, plugged)
        if found["readiness"] == "guest" and cid is None:
            raise self._document.error(
                ("readiness",), "readiness = 'guest' needs a vsock", "add [vsock]"
            )
        socket = f"{name}.sock" if found["socket"] is None else found["socket"] or None
        interfaces = tuple(self._interface(*each) for each in enumerate(found["interfaces"]))
        self._check_distinct("interfaces", "id", [each.id for each in interfaces])
        self._check_distinct("interfaces", "mac", [each.mac for each in interfaces])
        volumes = tuple(self._volume(*each) for each in enumerate(found["volumes"]))
        self._check_distinct("volumes", "image", [each.image for each in volumes])
        shares = tuple(self._share(*each) for each in enumerate(found["shares"]))
        self._check_distinct("shares", "tag", [each.tag for each in shares])
        self._check_distinct("shares", "socket", [each.socket or each.tag for each in shares])
        devices = tuple(self._device(*each) for each in enumerate(found["devices"]))
        self._check_distinct("devices", "path", [each.address or each.path for each in devices])
        forwards = tuple(self._forward(*each) for each in enumerate(found["forwardPorts"]))
        self._check_forwards(forwards)
        if forwards and not any(each.type == "user" for each in interfaces):
            raise self._document.error(
                ("forwardPorts", 0),
                "forwardPorts needs an interface of type user, and there is none",
                'add [[interfaces]] with type = "user"',
            )
        qemu = found["qemu"]
        return Guest(
            name=name,
            kernel=found["kernel"],
            machine_id=found["machineId"] or derived.machine_id(name, self._host_id),
            hypervisor=found["hypervisor"],
            initrd=found["initrd"],
            kernel_params=found["kernelParams"],
            vcpu=found["vcpu"],
            mem=found["mem"],
            balloon=found["balloon"],
            deflate_on_oom=found["deflateOnOOM"],
            initial_balloon_mem=found["initialBalloonMem"],
            hotplug_mem=hotplug,
            hotplugged_mem=hotplug if plugged is None else plugged,
            cpu=found["cpu"],
            volumes=volumes,
            interfaces=interfaces,
            forward_ports=forwards,
            shares=shares,
            devices=devices,
            vsock_cid=cid,
            readiness=found["readiness"],
            socket=socket,
            register_with_machined=found["registerWithMachined"],
            credential_files=found["credentialFiles"],
            cloud_init=self._cloud_init(found["cloudInit"]) if "cloudInit" in guest else None,
            qemu=Qemu(
                machine=qemu["machine"],
                machine_opts=qemu["machineOpts"],
                extra_args=qemu["extraArgs"],
                serial_console=qemu["serialConsole"],
                guest_agent=qemu["guestAgent"],
            ),
            own_arguments=tuple((each, found[each]["extraArgs"]) for each in OWN_TABLES),
            oem_strings=found["cloud-hypervisor"]["platformOEMStrings"],
        )

    def _wrong(self, at: Path, message: str, hint: str = "") -> Exception:
        return self._document.error(at, message, hint)

    def _check_hotplug(self, hotplug: int, plugged: int | None) -> None:
        if plugged is not None and plugged > hotplug:
            raise self._wrong(
                ("hotpluggedMem",), f"hotpluggedMem = {plugged} is more than hotplugMem = {hotplug}"
            )

    def _check_distinct(self, array: str, key: str, values: list[str]) -> None:
        for number, value in enumerate(values):
            if value in values[:number]:
                raise self._wrong((array, number, key), f"{array}.{key} {value!r} is there twice")

    def _volume(self, number: int, found: dict[str, Any]) -> Volume:
        volume = Volume(
            image=_normal(found["image"]),
            size=found["size"],
            auto_create=found["autoCreate"],
            fs_type=found["fsType"],
            label=found["label"],
            mkfs_extra_args=found["mkfsExtraArgs"],
            image_type=found["imageType"],
            read_only=found["readOnly"],
            direct=found["direct"],
            serial=found["serial"],
            source=found["source"],
        )
        if volume.image == ".":
            raise self._wrong(
                ("volumes", number, "image"), f"volumes.image = {found['image']!r} is no file"
            )
        # erofs is as large as what is in it.
        has_size = volume.size is not None or volume.fs_type == "erofs"
        if volume.is_file and volume.auto_create and not has_size:
            raise self._wrong(
                ("volumes", number),
                f"volumes.size is missing: {volume.image!r} is to be made if it is not there",
                "give its size in MiB, or autoCreate = false",
            )
        return volume

    def _interface(self, number: int, found: dict[str, Any]) -> Interface:
        at = ("interfaces", number)
        kind, macvtap = found["type"], found["macvtap"]
        given = self._document.table["interfaces"][number]
        if kind == "macvtap" and macvtap["link"] is None:
            raise self._wrong(
                at,
                "interfaces.macvtap.link is missing",
                'a macvtap is on an interface of the host: macvtap.link = "eth0"',
            )
        if kind == "bridge" and found["bridge"] is None:
            raise self._wrong(
                at, "interfaces.bridge is missing", 'name a bridge of the host: bridge = "br0"'
            )
        for key, kinds in (
            ("macvtap", ("macvtap",)),
            ("bridge", ("bridge", "tap")),
            ("tap", ("tap", "bridge")),
            ("mtu", ("tap", "bridge", "macvtap")),
        ):
            if key in given and kind not in kinds:
                raise self._wrong(
                    (*at, key),
                    f"interfaces.{key} is not for an interface of type {kind}",
                    f"for {' and '.join(kinds)} it is",
                )
        if macvtap["link"] == found["id"]:
            raise self._wrong(
                (*at, "macvtap", "link"),
                f"interfaces.macvtap.link = {found['id']!r} is the interface itself",
            )
        return Interface(
            type=kind,
            id=found["id"],
            mac=found["mac"] or derived.mac(self._name, found["id"], self._host_id),
            bridge=found["bridge"],
            link=macvtap["link"],
            mode=macvtap["mode"],
            vhost=found["tap"]["vhost"],
            mtu=found["mtu"],
        )

    def _forward(self, number: int, found: dict[str, Any]) -> Forward:
        host, guest = found["host"], found["guest"]
        forward = Forward(
            source=found["from"],
            proto=found["proto"],
            host_address=host["address"],
            host_port=host["port"],
            guest_address=guest["address"],
            guest_port=guest["port"],
        )
        if forward.source == "guest" and not forward.guest_address:
            raise self._wrong(
                ("forwardPorts", number),
                "forwardPorts.guest.address is missing",
                "what the guest connects to has an address in its network, 10.0.2.0/24: "
                'guest.address = "10.0.2.100"',
            )
        if forward.source == "guest" and not _is_free(forward.guest_address):
            raise self._wrong(
                ("forwardPorts", number, "guest", "address"),
                f"forwardPorts.guest.address = {forward.guest_address!r} is not one that a guest "
                "could find something of the host at",
                "give one of its network, 10.0.2.0/24, that is not the network's own: 10.0.2.100",
            )
        return forward

    def _check_forwards(self, forwards: tuple[Forward, ...]) -> None:
        """Nothing listens at one port twice."""
        for number, each in enumerate(forwards):
            if any(_is_in_the_way(each, other) for other in forwards[:number]):
                end = each.source
                port = each.host_port if end == "host" else each.guest_port
                raise self._wrong(
                    ("forwardPorts", number, end, "port"),
                    f"forwardPorts.{end}.port = {port} is forwarded twice",
                )

    def _share(self, number: int, found: dict[str, Any]) -> Share:
        at = ("shares", number)
        proto, tag, socket = found["proto"], found["tag"], found["socket"]
        if proto == "9p":
            given = self._document.table["shares"][number]
            for key in ("socket", "cache", "posixAcl", "extraArgs"):
                if key in given:
                    raise self._wrong(
                        (*at, key), f"shares.{key} is for virtiofs", 'add proto = "virtiofs"'
                    )
            if len(tag.encode()) > _TAG_9P_MAX:
                raise self._wrong(
                    (*at, "tag"), f"shares.tag {tag!r} is longer than {_TAG_9P_MAX} bytes, for 9p"
                )
        for part in tag.split("/"):
            if part in _SHARE_FILES and proto == "virtiofs":
                raise self._wrong(
                    (*at, "tag"),
                    f"shares.tag {tag!r} has {part!r} in it, a file of each share's in the package",
                )
        path = f"{paths.HostPaths().vm(self._name)}/{socket}"
        if socket and not names.is_socket_path(path):
            raise self._wrong(
                (*at, "socket"),
                f"shares.socket = {socket!r} makes a path that is too long for a socket, with "
                f"{len(path.encode())} bytes: {path}",
                "give it a shorter name, or none",
            )
        translates = [arg for arg in found["extraArgs"] if arg.startswith("--translate-")]
        if found["posixAcl"] and translates:
            raise self._wrong(
                (*at, "extraArgs"),
                f"shares.extraArgs has {translates[0]!r}, which virtiofsd does not do with "
                "POSIX ACLs",
                "add posixAcl = false",
            )
        return Share(
            tag=tag,
            source=found["source"],
            proto=proto,
            read_only=found["readOnly"],
            cache=found["cache"],
            posix_acl=found["posixAcl"],
            socket=(socket or derived.share_socket(self._name, tag))
            if proto == "virtiofs"
            else None,
            extra_args=found["extraArgs"],
            security_model=found["securityModel"],
        )

    def _cloud_init(self, found: dict[str, Any]) -> CloudInit:
        given = self._document.table["cloudInit"]
        for file, keys in (
            ("userData", ("sshAuthorizedKeys", "users")),
            ("metaData", ("hostname", "instanceId")),
        ):
            for key in keys:
                if file in given and key in given:
                    raise self._wrong(
                        ("cloudInit", key),
                        f"cloudInit has both {file} and {key}",
                        f"write it into {given[file]}",
                    )
        hostname = found["hostname"] or self._name
        if found["metaData"] is None and not names.is_host_name(hostname):
            raise self._wrong(
                ("cloudInit",),
                f"cloudInit.hostname is missing, and the VM's name {hostname!r} cannot be one",
                'give one: hostname = "web"',
            )
        for number, user in enumerate(found["users"]):
            if user["name"] in [other["name"] for other in found["users"][:number]]:
                raise self._wrong(
                    ("cloudInit", "users", number, "name"),
                    f"cloudInit.users.name {user['name']!r} is there twice",
                )
        return CloudInit(
            hostname=hostname,
            instance_id=found["instanceId"] or derived.instance_id(self._name),
            ssh_authorized_keys=found["sshAuthorizedKeys"],
            users=tuple(
                CloudUser(
                    name=user["name"],
                    gecos=user["gecos"],
                    groups=user["groups"],
                    shell=user["shell"],
                    sudo=user["sudo"],
                    ssh_authorized_keys=user["sshAuthorizedKeys"],
                )
                for user in found["users"]
            ),
            user_data=found["userData"],
            meta_data=found["metaData"],
            network_config=found["networkConfig"],
            vendor_data=found["vendorData"],
        )

    def _device(self, number: int, found: dict[str, Any]) -> Device:
        at = ("devices", number, "path")
        bus, path, qemu = found["bus"], found["path"], found["qemu"]
        address = ""
        if bus == "pci":
            try:
                address = names.pci_address(path)
            except NameInvalid as error:
                raise self._wrong(at, f"devices.path: {error.message}", error.hint) from error
            if "*" in address:
                raise self._wrong(
                    at,
                    f"devices.path = {path!r} may stand for several devices",
                    "name each by its address",
                )
        elif not all("=" in word for word in path.split(",")):
            raise self._wrong(
                at,
                f"devices.path = {path!r} is not how QEMU names a USB device",
                "vendorid=0xabcd,productid=0x0123 is, and hostbus=1,hostport=2",
            )
        return Device(
            bus=bus,
            path=path,
            address=address,
            qemu_id=qemu["id"],
            qemu_bus=qemu["bus"],
            qemu_extra=qemu["deviceExtraArgs"],
        )


def _normal(image: str) -> str:
    """An image's path in its shortest form, of which a file has one; other names as they are."""
    short = normpath(image)
    if image.startswith("rbd:") or short.startswith("rbd:"):
        return image
    return f"/{short.lstrip('/')}" if short.startswith("/") else short


def _is_free(address: str) -> bool:
    """Whether an address of QEMU's own network is nobody's, as it is written in one way only."""
    last = address.removeprefix(_GUEST_NETWORK)
    is_plain = last.isdigit() and str(int(last)) == last
    return address != last and is_plain and last not in _GUEST_NETWORK_OWN


def _is_in_the_way(one: Forward, other: Forward) -> bool:
    """Whether both would listen at the same place."""
    if (one.source, one.proto) != (other.source, other.proto):
        return False
    if one.source == "guest":
        return (one.guest_address, one.guest_port) == (other.guest_address, other.guest_port)
    addresses = {one.host_address, other.host_address}
    is_same = len(addresses) == 1 or not addresses.isdisjoint(_ANY_ADDRESS)
    return is_same and one.host_port == other.host_port


def _check_claims(name: str, document: Document, others: claims.Claims, host_id: str) -> None:
    own: dict[claims.Claim, Path] = {}
    for wish in claims.wishes(name, document.table, host_id):
        what, text = wish.what, wish.text
        other = claims.holder(others, wish.claim, name)
        if other is not None:
            raise document.error(wish.at, f"{what} {text} is that of microVM {other}", _HINTS[what])
        # By another path. What stands there twice has been told already.
        mine = {claim: [str(at)] for claim, at in own.items() if at != wish.at}
        if what in (claims.IMAGE, claims.SOCKET) and claims.holder(mine, wish.claim, ""):
            raise document.error(wish.at, f"{what} {text} is given twice, by different paths")
        own.setdefault(wish.claim, wish.at)


_HINTS = {
    claims.MAC: "give it another by interfaces.mac",
    claims.CID: "give it another by vsock.cid",
    claims.INTERFACE: "interfaces of the host have one name each",
    claims.IMAGE: "two VMs that write to one disk destroy it; they may share it where both have "
    "readOnly = true",
    claims.PORT: "one of them can listen there",
    claims.SOCKET: "one of them can listen there",
}
