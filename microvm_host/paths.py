# SPDX-License-Identifier: MIT
"""Every path of the host in one place.

The environment variable MICROVM_HOST_ROOT re-roots all of them, so that tests and images can
work on a tree of their own. Nothing else in the toolkit writes down a path of the host.
"""

from __future__ import annotations

import os

from .frozen import frozen

# Where distributions put virtiofsd, best first: it is never in $PATH, since it is no command for
# people. The one below qemu/ is QEMU's former C program, with options of its own.
VIRTIOFSD_PLACES = (
    "/usr/local/libexec/virtiofsd",
    "/usr/libexec/virtiofsd",
    "/usr/lib/virtiofsd",
    "/usr/libexec/qemu/virtiofsd",
    "/usr/lib/qemu/virtiofsd",
    "/usr/bin/virtiofsd",
)

# Names of PCI devices: Debian and its kin, and the others.
PCI_IDS_PLACES = ("/usr/share/misc/pci.ids", "/usr/share/hwdata/pci.ids")

# A tree that was unpacked without the usr merge has its modules below /usr alone.
MODULES_PLACES = ("/lib/modules", "/usr/lib/modules")

# The load path of systemd, but for the distribution's units.
UNIT_PLACES = (
    "/etc/systemd/system.control",
    "/run/systemd/system.control",
    "/run/systemd/transient",
    "/run/systemd/generator.early",
    "/etc/systemd/system",
    "/run/systemd/system",
    "/run/systemd/generator",
    "/usr/local/lib/systemd/system",
    "/run/systemd/generator.late",
)

MICROVM_RUN = "bin/microvm-run"
MICROVM_SHUTDOWN = "bin/microvm-shutdown"
MICROVM_PREPARE = "bin/microvm-prepare"
# What one has open, by number: a link that leads to it, whatever its name means by now
# (proc_pid_fd(5)). The kernel's own, so that no root is before it.
OPENED = "/proc/self/fd"
# What the kernel tells of each of these (proc_pid_fdinfo(5)).
OPENED_FACTS = "/proc/self/fdinfo"

# What is mounted where, for this process: the kernel's own as well.
MOUNTS = "/proc/self/mountinfo"

VIRTIOFSD_RUN = "bin/virtiofsd-run"
MICROVM_BALLOON = "bin/microvm-balloon"
MICROVM_REGISTER = "bin/microvm-register"
MICROVM_UNREGISTER = "bin/microvm-unregister"

# Where systemd takes what sd_notify(3) sends.
NOTIFY_SOCKET = "/run/systemd/notify"
# Where device nodes are, on this host and in guests.
DEVICES = "/dev"
# What scripts of packages read, and hypervisors are told, of the host's devices.
PCI_DEVICES = "/sys/bus/pci/devices"
NET_DEVICES = "/sys/class/net"
# What scripts of packages are run by: POSIX has it nowhere else.
SHELL = "/bin/sh"
# Where programs are that packages call, whatever the $PATH of who builds them.
PROGRAM_PLACES = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
# Where QEMU is in distributions that do not have it for people to call.
QEMU_PLACES = (*PROGRAM_PLACES, "/usr/libexec")


# Holds one directory a VM, with what root hands to its user for as long as it runs. Packages name
# files in there.
PRIVATE = "/run/microvm-host-private"


def private_file(vm: str, name: str) -> str:
    """Where a private file of a VM is for the hypervisor, as packages of that VM name it."""
    return f"{PRIVATE}/{vm}/{name}"


@frozen
class HostPaths:
    """The host's paths below `root` (`/` but in tests and images)."""

    root: str = "/"

    @classmethod
    def from_environment(cls) -> HostPaths:
        """The paths below $MICROVM_HOST_ROOT, `/` without it."""
        return cls(os.environ.get("MICROVM_HOST_ROOT") or "/")

    def at(self, path: str) -> str:
        """`path`, an absolute path of the host, below the root."""
        return path if self.root == "/" else self.root.rstrip("/") + path

    @property
    def state(self) -> str:
        """Holds one directory a VM, as on NixOS."""
        return self.at("/var/lib/microvms")

    def vm(self, name: str) -> str:
        """The state directory of one VM and the working directory of its hypervisor."""
        return f"{self.state}/{name}"

    def current(self, name: str) -> str:
        """Link to the package that the next start runs."""
        return f"{self.vm(name)}/current"

    def booted(self, name: str) -> str:
        """Link to the package that runs now; absent while the VM is down."""
        return f"{self.vm(name)}/booted"

    @property
    def packages(self) -> str:
        """Holds the packages that were built from declarations, DIGEST-NAME."""
        return self.at("/var/lib/microvm-host/packages")

    def build_link(self, name: str) -> str:
        """Link to what nix has just built for a VM, which keeps that from being collected."""
        return self.at(f"/var/lib/microvm-host/builds/{name}")

    @property
    def blobs(self) -> str:
        """Holds the kernels and initrds of these packages, each once, by its SHA-256."""
        return self.at("/var/lib/microvm-host/blobs")

    @property
    def build_records(self) -> str:
        """Holds a file a VM: what its package was built from."""
        return self.at("/var/lib/microvm-host/built")

    def build_record(self, name: str) -> str:
        return f"{self.build_records}/{name}"

    @property
    def file_facts(self) -> str:
        """Holds what was found out about files, until the host boots again."""
        return self.at("/run/microvm-host-facts")

    @property
    def boot_id(self) -> str:
        """Tells this boot from others (random(4))."""
        return self.at("/proc/sys/kernel/random/boot_id")

    @property
    def histories(self) -> str:
        """Holds a file a VM, with the packages that it had."""
        return self.at("/var/lib/microvm-host/history")

    def history(self, name: str) -> str:
        return f"{self.histories}/{name}.json"

    @property
    def guests(self) -> str:
        """Holds the guests that `microvm init` made."""
        return self.at("/var/lib/microvm-host/guests")

    def kernel_places(self, version: str) -> tuple[str, ...]:
        """Where distributions put the image of a kernel."""
        return (
            self.at(f"/boot/vmlinuz-{version}"),
            self.at(f"/usr/lib/modules/{version}/vmlinuz"),
            self.at(f"/lib/modules/{version}/vmlinuz"),
        )

    def modules_places(self, version: str) -> tuple[str, ...]:
        """The directories of a kernel's modules; of an empty version, those of all kernels."""
        return tuple(self.at(f"{place}/{version}") for place in MODULES_PLACES)

    def busybox_places(self) -> tuple[str, ...]:
        return (self.at("/bin/busybox"), self.at("/usr/bin/busybox"), self.at("/sbin/busybox"))

    @property
    def vhost_vsock(self) -> str:
        """What gives a guest a vsock, by the host's kernel."""
        return self.at("/dev/vhost-vsock")

    @property
    def debian_keyring(self) -> str:
        """The keys of Debian's archive, where a distribution has them as a package."""
        return self.at("/usr/share/keyrings/debian-archive-keyring.gpg")

    def os_release_places(self) -> tuple[str, ...]:
        """What tells which distribution this is (os-release(5))."""
        return (self.at("/etc/os-release"), self.at("/usr/lib/os-release"))

    def ssh_directory(self, home: str) -> str:
        """Where a user has their ssh keys."""
        return self.at(f"{home}/.ssh")

    @property
    def packages_lock(self) -> str:
        """Held by whoever puts packages there or takes them away."""
        return self.at("/run/microvm-host-packages.lock")

    @property
    def install_locks(self) -> str:
        """Holds a file a VM, locked by whoever installs or removes it."""
        return self.at("/run/microvm-host-install")

    @property
    def declarations(self) -> str:
        """Holds one NAME.toml a declared VM."""
        return self.at("/etc/microvms")

    def declaration(self, name: str) -> str:
        return f"{self.declarations}/{name}.toml"

    def user_drop_in(self, name: str) -> str:
        """The drop-in that names the user of a VM which is not declared."""
        return self.at(f"/etc/systemd/system/microvm@{name}.service.d/00-microvm-user.conf")

    @property
    def records(self) -> str:
        """Holds one directory a VM, with a record of each thing that was set up for it."""
        return self.at("/run/microvm-host")

    def record(self, name: str, what: str) -> str:
        return f"{self.records}/{name}/{what}"

    def private(self, name: str) -> str:
        """Holds what was handed to the user of one VM."""
        return self.at(f"{PRIVATE}/{name}")

    def pci_lock(self, what: str) -> str:
        """Held by whoever takes the PCI devices of an IOMMU group, or gives them back.

        `what` is the group's number, or `names` while network interfaces get their names back.
        """
        return self.at(f"/run/microvm-host-pci-{what}.lock")

    @property
    def reconcile_lock(self) -> str:
        """Held by `microvm reconcile` while it undoes something."""
        return self.at("/run/microvm-host.lock")

    def node_owner(self, kernel_name: str) -> str:
        """Tells udev whose a device node is; no VM's name begins with a dot."""
        return f"{self.records}/.nodes/{kernel_name}"

    def net_device(self, interface: str) -> str:
        """The sysfs directory of a network interface (sysfs-class-net(5))."""
        return self.at(f"/sys/class/net/{interface}")

    def ip_setting(self, family: str, interface: str, key: str) -> str:
        """A setting of an interface (kernel.org, networking/ip-sysctl), of `ipv4` or `ipv6`."""
        return self.at(f"/proc/sys/net/{family}/conf/{interface}/{key}")

    def macvtap_node(self, ifindex: int) -> str:
        return self.at(f"/dev/tap{ifindex}")

    def vfio_group_node(self, group: str) -> str:
        """The node of an IOMMU group with devices on vfio-pci (kernel.org, driver-api/vfio)."""
        return self.at(f"/dev/vfio/{group}")

    def vfio_device_node(self, name: str) -> str:
        """The node of a device on vfio-pci, `vfio0`, where the kernel makes these as well."""
        return self.at(f"/dev/vfio/devices/{name}")

    def uevent(self, subsystem: str, kernel_name: str) -> str:
        """Has the kernel send the event written here (kernel.org, ABI/testing/sysfs-uevent)."""
        return self.at(f"/sys/class/{subsystem}/{kernel_name}/uevent")

    @property
    def ksm_run(self) -> str:
        """Whether the kernel merges equal pages of memory (kernel.org, admin-guide/mm/ksm)."""
        return self.at("/sys/kernel/mm/ksm/run")

    def pci_device(self, address: str) -> str:
        """The sysfs directory of a PCI device (kernel.org, ABI/testing/sysfs-bus-pci)."""
        return self.at(f"/sys/bus/pci/devices/{address}")

    def pci_driver(self, driver: str) -> str:
        return self.at(f"/sys/bus/pci/drivers/{driver}")

    @property
    def pci_probe(self) -> str:
        """Has the kernel look for a driver for the device whose address is written here."""
        return self.at("/sys/bus/pci/drivers_probe")

    @property
    def iommu_groups(self) -> str:
        """Holds one directory a group of PCI devices that the IOMMU cannot tell apart."""
        return self.at("/sys/kernel/iommu_groups")

    @property
    def acpi_tables(self) -> str:
        return self.at("/sys/firmware/acpi/tables")

    @property
    def cpu_info(self) -> str:
        return self.at("/proc/cpuinfo")

    @property
    def kvm(self) -> str:
        return self.at("/dev/kvm")

    @property
    def kernel_command_line(self) -> str:
        return self.at("/proc/cmdline")

    @property
    def block_devices(self) -> str:
        """Where sysfs has all disks and partitions."""
        return self.at("/sys/class/block")

    def block_device(self, name: str) -> str:
        """The sysfs directory of a disk or partition."""
        return f"{self.block_devices}/{name}"

    def block_number(self, number: str) -> str:
        """The sysfs directory of a block device by its number, `8:0`."""
        return self.at(f"/sys/dev/block/{number}")

    def block_node(self, name: str) -> str:
        # sysfs writes `!` for the `/` of names such as cciss/c0d0.
        return self.at(f"/dev/{name.replace('!', '/')}")

    @property
    def container(self) -> str:
        """systemd's file, on hosts that are containers, which says of what kind."""
        return self.at("/run/systemd/container")

    @property
    def mounts(self) -> str:
        return self.at("/proc/self/mountinfo")

    def unit_directories(self) -> tuple[str, ...]:
        """Where units of the administrator and of generators are, the first to count first.

        Not the distribution's own: its mounts are the kernel's file systems, and others that an
        administrator may have turned off (systemd.unit(5)).
        """
        return tuple(self.at(place) for place in UNIT_PLACES)

    @property
    def swaps(self) -> str:
        return self.at("/proc/swaps")

    @property
    def locks(self) -> str:
        """Tells who has locked which file (proc_locks(5))."""
        return self.at("/proc/locks")

    def process(self, pid: int) -> str:
        return self.at(f"/proc/{pid}")

    @property
    def dhcp_leases(self) -> str:
        """Holds a file for each DHCP server of systemd-networkd's, from systemd 257 on."""
        return self.at("/var/lib/systemd/network/dhcp-server-lease")

    @property
    def arp_table(self) -> str:
        return self.at("/proc/net/arp")

    @property
    def networkd_files(self) -> str:
        """Where an administrator's files for systemd-networkd are (systemd.network(5))."""
        return self.at("/etc/systemd/network")

    @property
    def ipv4_routes(self) -> str:
        return self.at("/proc/net/route")

    @property
    def ipv6_routes(self) -> str:
        return self.at("/proc/net/ipv6_route")

    @property
    def tun(self) -> str:
        return self.at("/dev/net/tun")

    @property
    def journal_socket(self) -> str:
        """Where journald takes structured messages (systemd.journal-fields(7))."""
        return self.at("/run/systemd/journal/socket")

    @property
    def own_cgroup(self) -> str:
        """Tells the cgroup of the process that reads it, which is its unit's."""
        return self.at("/proc/self/cgroup")

    @property
    def kmsg(self) -> str:
        return self.at("/dev/kmsg")

    @property
    def systemd_private_socket(self) -> str:
        """systemd's own D-Bus socket, for root, which works without a bus."""
        return self.at("/run/systemd/private")

    @property
    def machined_socket(self) -> str:
        """Where systemd-machined speaks Varlink, from 257 on."""
        return self.at("/run/systemd/machine/io.systemd.Machine")

    @property
    def machine_id(self) -> str:
        """What tells this host from others (machine-id(5))."""
        return self.at("/etc/machine-id")

    @property
    def gc_roots(self) -> str:
        """Links here keep what they point to from nix's garbage collector."""
        return self.at("/nix/var/nix/gcroots/microvm")

    def virtiofsd_places(self) -> tuple[str, ...]:
        return tuple(self.at(place) for place in VIRTIOFSD_PLACES)

    def pci_ids_places(self) -> tuple[str, ...]:
        return tuple(self.at(place) for place in PCI_IDS_PLACES)
