# SPDX-License-Identifier: MIT
# make demo        boots a throw-away host and runs a microVM in it, start to end
# make demo-shell  the same, leaving you at a shell of that host
# make test        all tests, in throw-away hosts; installs what they need
# make test-faults those tests that break things on purpose, with all their rounds: an hour
# make fuzz        a million broken inputs for whatever root reads: ten minutes, as make check
# make bench       measures the toolkit beside shell scripts and supervisord: a quarter of an hour
# make check       format, types, unit, golden and static tests: a minute, and no root once
#                  what it needs is installed
# make install     into this machine, below /usr/local: PREFIX=/usr where that is a file system of
#                  its own, or SELinux enforces; DESTDIR and the directories below are honoured,
#                  and V=1 shows each command
# make uninstall   removes that; VMs, their state and their declarations stay
# make deb         the Debian package of this checkout, into build/deb
# make clean       what tests and demo keep for the next time: roots of hosts, the Python tools

PREFIX ?= /usr/local
DESTDIR ?=
PYTHON ?= /usr/bin/python3
# Empty where a package manager compiles at installation.
COMPILE ?= yes

bindir ?= $(PREFIX)/bin
libdir ?= $(PREFIX)/lib
# Programs that systemd runs: SELinux lets it run nothing below lib.
libexecdir ?= $(PREFIX)/libexec
datarootdir ?= $(PREFIX)/share
mandir ?= $(datarootdir)/man
bashcompletiondir ?= $(datarootdir)/bash-completion/completions
pkgdir ?= $(libdir)/microvm-host
helperdir ?= $(libexecdir)/microvm-host
datadir ?= $(datarootdir)/microvm-host
unitdir ?= $(libdir)/systemd/system
generatordir ?= $(libdir)/systemd/system-generators
presetdir ?= $(libdir)/systemd/system-preset
sysusersdir ?= $(libdir)/sysusers.d
tmpfilesdir ?= $(libdir)/tmpfiles.d
modulesloaddir ?= $(libdir)/modules-load.d
# udev(7) reads this below /usr/local as well.
udevrulesdir ?= $(libdir)/udev/rules.d

# Not a setting: tmpfiles.d, the man pages and the Python code name it too.
statedir = /var/lib/microvms
# Nor this, which tmpfiles.d makes: there is no other place where ssh looks.
sshlink = /etc/ssh/ssh_config.d/25-microvm-host.conf

INSTALL ?= install
FILL = sed -e 's|@python@|$(PYTHON)|g' -e 's|@pkgdir@|$(pkgdir)|g' \
	-e 's|@libexecdir@|$(helperdir)|g' -e 's|@unitdir@|$(unitdir)|g' -e 's|@statedir@|$(statedir)|g' \
	-e 's|@datadir@|$(datadir)|g'

UNITS = $(patsubst units/%.in,%,$(wildcard units/*.in))
PLAIN_UNITS = $(notdir $(wildcard units/*.target))
RULES = $(notdir $(wildcard udev/*.rules))
PACKAGES = $(sort $(dir $(wildcard microvm_host/*.py microvm_host/*/*.py)))
MANPAGES = $(notdir $(wildcard man/*.[1-8]))

.PHONY: all check-host install uninstall check fuzz test test-faults bench demo demo-shell deb format \
	clean
all:
	@sed -n 's/^# make/make/p' Makefile

ifndef V
.SILENT: install uninstall check-host
endif

# What the toolkit needs, before anything is changed.
PYTHON_SINCE = 3.11
SYSTEMD_SINCE = 252
check-host:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < tuple(map(int, \
		"$(PYTHON_SINCE)".split("."))))' || { \
		echo "$(PYTHON) is missing, or older than $(PYTHON_SINCE): PYTHON=/path/to/python3" \
			"names another" >&2; exit 1; }
ifeq ($(DESTDIR),)
	version=$$(systemctl --version | sed -n '1s/^systemd \([0-9]*\).*/\1/p'); \
	if [ "$${version:-0}" -lt $(SYSTEMD_SINCE) ]; then \
		echo "this host has systemd $${version:-not at all}; $(SYSTEMD_SINCE) or newer is" \
			"needed" >&2; exit 1; fi
	if [ "$$(id -u)" != 0 ]; then \
		echo "make install changes this machine and needs root: sudo make install" >&2; \
		exit 1; fi
endif

# A new tree of Python files comes into the place of the former one by one rename. A helper that
# runs meanwhile keeps the one that it began with (bin/helper.in), until the next install. Packages
# (DESTDIR) have a plain directory.
tree := $(if $(DESTDIR),$(DESTDIR)$(pkgdir),$(shell mktemp -u $(pkgdir)-XXXXXXXX))

install: check-host
	$(INSTALL) -d $(addprefix $(DESTDIR),$(bindir) $(unitdir) $(generatordir) $(presetdir) \
		$(sysusersdir) $(tmpfilesdir) $(modulesloaddir) $(udevrulesdir) $(bashcompletiondir) \
		$(datadir)/network $(helperdir) \
		$(addprefix $(mandir)/man,$(sort $(subst .,,$(suffix $(MANPAGES)))))) \
		$(addprefix $(tree)/,$(PACKAGES))
	for package in $(PACKAGES); do \
		$(INSTALL) -m 644 $$package*.py $(tree)/$$package || exit 1; done
	# By this, the command finds them as in a checkout.
	ln -srfn $(DESTDIR)$(datadir) $(tree)/data
	# Compiled once here instead of at every start: the helpers run isolated, and some of them
	# as users who could not write the result. The path is the one that it will run from.
	$(if $(COMPILE),$(PYTHON) -m compileall -q -f -s $(tree) -p $(pkgdir) $(tree)/microvm_host)
ifeq ($(DESTDIR),)
	# Of the trees before, the last one stays for whoever runs from it.
	for other in $(pkgdir)-????????; do \
		case $$other in $(tree)|"$$(readlink -f $(pkgdir))") ;; *) rm -rf $$other ;; esac; done
	if [ -d $(pkgdir) ] && [ ! -h $(pkgdir) ]; then \
		mv -T $(pkgdir) $$(mktemp -u $(pkgdir)-XXXXXXXX); fi
	ln -sfn $(notdir $(tree)) $(tree).link && mv -fT $(tree).link $(pkgdir)
endif
	for unit in $(UNITS); do $(FILL) units/$$unit.in > $(DESTDIR)$(unitdir)/$$unit || exit 1; \
		chmod 644 $(DESTDIR)$(unitdir)/$$unit; done
	for unit in $(PLAIN_UNITS); do \
		$(INSTALL) -m 644 units/$$unit $(DESTDIR)$(unitdir) || exit 1; done
	for program in $(helperdir)/helper $(bindir)/microvm $(generatordir)/microvm-generator; do \
		file=$(DESTDIR)$$program; $(FILL) bin/$${program##*/}.in > $$file.new && \
		chmod 755 $$file.new && mv -f $$file.new $$file || exit 1; done
	$(INSTALL) -m 644 data/sysusers.conf $(DESTDIR)$(sysusersdir)/microvm-host.conf
	$(FILL) data/tmpfiles.conf.in > $(DESTDIR)$(tmpfilesdir)/microvm-host.conf
	$(FILL) data/ssh_config.in > $(DESTDIR)$(datadir)/ssh_config
	chmod 644 $(DESTDIR)$(tmpfilesdir)/microvm-host.conf $(DESTDIR)$(datadir)/ssh_config
	$(INSTALL) -m 644 data/modules-load.conf $(DESTDIR)$(modulesloaddir)/microvm-host.conf
	$(INSTALL) -m 644 data/preset $(DESTDIR)$(presetdir)/90-microvm-host.preset
	$(INSTALL) -m 644 data/microvm.schema.json $(DESTDIR)$(datadir)/microvm.schema.json
	$(INSTALL) -m 644 $(wildcard data/network/*) $(DESTDIR)$(datadir)/network
	for rules in $(RULES); do \
		$(INSTALL) -m 644 udev/$$rules $(DESTDIR)$(udevrulesdir) || exit 1; done
	for page in $(MANPAGES); do \
		$(INSTALL) -m 644 man/$$page $(DESTDIR)$(mandir)/man$${page##*.} || exit 1; done
	$(INSTALL) -m 644 completion/microvm.bash $(DESTDIR)$(bashcompletiondir)/microvm
ifeq ($(DESTDIR),)
	if [ -e /sys/fs/selinux/enforce ] && command -v restorecon >/dev/null; then \
		restorecon -R $(bindir)/microvm $(helperdir) $(tree) $(pkgdir) $(datadir) $(unitdir) \
			$(generatordir); fi
	systemd-sysusers $(sysusersdir)/microvm-host.conf
	systemd-tmpfiles --create $(tmpfilesdir)/microvm-host.conf
	if [ -d /run/systemd/system ]; then \
		systemctl daemon-reload; \
		systemctl -q preset microvms.target 2>/dev/null || systemctl preset microvms.target; \
		for module in $$(sed -n '/^[a-z]/p' data/modules-load.conf); do \
			modprobe -q $$module || true; done; \
	fi
	# Nodes that are there already get their group now. Containers have no udev.
	if [ -d /run/systemd/system ] && systemctl -q is-active systemd-udevd.service; then \
		udevadm control --reload && udevadm trigger --settle --action=change \
			--subsystem-match=misc --sysname-match='vhost-*' --sysname-match=iommu; \
	fi
	# systemd loads units and runs generators before it mounts anything but /usr.
	for directory in $(unitdir) $(generatordir); do \
		place=$$(stat -c %m $$directory); \
		case $$place in /|/usr) ;; *) \
			echo "warning: $$directory lies on $$place, which is mounted after systemd has" \
				"looked for units: no VM will start at boot. Install with PREFIX=/usr." >&2; \
			break ;; esac; done
	if [ "$(PREFIX)" != /usr ] && [ "$$(cat /sys/fs/selinux/enforce 2>/dev/null)" = 1 ]; then \
		echo "warning: SELinux enforces its rules here, which are written for programs below" \
			"/usr: if units fail with 'Permission denied', install with PREFIX=/usr." >&2; fi
	echo "microvm-host is installed below $(PREFIX)."
	echo "Next: 'microvm init NAME' makes a guest and its declaration, 'microvm apply' starts it;"
	echo "'man microvm-host' tells more. 'make uninstall' removes the toolkit and no VM."
endif

# VMs, their state and their declarations stay, and so does the user who owns files of theirs.
uninstall:
ifeq ($(DESTDIR),)
	if [ -d /run/systemd/system ] && \
		systemctl -q is-active 'microvm@*.service' 'microvm-foreground-*.service'; then \
		echo "microVMs are running: stop them first, with systemctl stop 'microvm@*'" >&2; \
		exit 1; fi
	if [ -d /run/systemd/system ]; then systemctl -q disable microvms.target 2>/dev/null || \
		true; fi
	rm -rf $(pkgdir)-????????
endif
	rm -rf $(DESTDIR)$(pkgdir) $(DESTDIR)$(helperdir) $(DESTDIR)$(datadir)
	rm -f $(DESTDIR)$(bindir)/microvm $(DESTDIR)$(generatordir)/microvm-generator \
		$(addprefix $(DESTDIR)$(unitdir)/,$(UNITS) $(PLAIN_UNITS)) \
		$(addprefix $(DESTDIR)$(udevrulesdir)/,$(RULES)) \
		$(DESTDIR)$(sysusersdir)/microvm-host.conf $(DESTDIR)$(tmpfilesdir)/microvm-host.conf \
		$(DESTDIR)$(modulesloaddir)/microvm-host.conf \
		$(DESTDIR)$(presetdir)/90-microvm-host.preset $(DESTDIR)$(bashcompletiondir)/microvm
	for page in $(MANPAGES); do rm -f $(DESTDIR)$(mandir)/man$${page##*.}/$$page; done
ifeq ($(DESTDIR),)
	for file in $(notdir $(wildcard data/network/*)); do \
		if [ -h /etc/systemd/network/$$file ]; then rm -f /etc/systemd/network/$$file; fi; done
	rm -f /run/microvm-host.lock /run/microvm-host-pci-*.lock /run/microvm-host-packages.lock
	rm -rf /run/microvm-host-install /run/microvm-host-facts
	for directory in /run/microvm-host /run/microvm-host-private; do \
		rmdir --ignore-fail-on-non-empty $$directory 2>/dev/null || true; done
	# The link alone: a file of that name is the administrator's.
	if [ -h $(sshlink) ]; then rm -f $(sshlink); fi
	if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
	if [ -d /run/systemd/system ] && systemctl -q is-active systemd-udevd.service; then \
		udevadm control --reload; fi
	echo "microvm-host is removed from below $(PREFIX)."
	for kept in $(statedir) /var/lib/microvm-host /etc/microvms \
		/etc/systemd/system/microvm@*.service.d; do \
		if [ -d $$kept ] && [ -n "$$(ls -A $$kept)" ]; then echo "Kept: $$kept"; fi; done
	echo "Kept: the user microvm, and microvm-NAME of each VM that had a user of its own."
endif

# Test hosts need root; `sudo` keeps the environment's few settings that matter.
SETTINGS = CI $(addprefix MICROVM_HOST_TEST_,CACHE MIRROR ROUNDS SUITES)
AS_ROOT = $(if $(filter 0,$(shell id -u)),,sudo $(addprefix --preserve-env=,$(SETTINGS)))
TEST_PYTHON ?= python3
export TEST_PYTHON

CODE = microvm_host tests
# Where the tools are is known only once they are installed, so that each recipe asks.
IN_TOOLS = tools=$$(tests/environment) &&
# -B and no cache: nothing is written into the checkout, by whichever user.
PYTEST = $$tools/bin/python -B -m pytest -p no:cacheprovider

# Four at a time on however many processors: half of them wait for something.
check:
	$(IN_TOOLS) $$tools/bin/ruff format --no-cache --check -q $(CODE)
	$(IN_TOOLS) $$tools/bin/ruff check --no-cache -q $(CODE)
	$(IN_TOOLS) $$tools/bin/mypy --cache-dir=$$tools/mypy-cache $(CODE)
	$(IN_TOOLS) $(PYTEST) -q -n 4 tests/unit tests/static

# FUZZ="package --runs 5000000 --seed 2" says which, how many and which others.
fuzz:
	$(IN_TOOLS) $$tools/bin/python -B -m tests.fuzz $(FUZZ)

format:
	$(IN_TOOLS) $$tools/bin/ruff check --no-cache -q --fix $(CODE)
	$(IN_TOOLS) $$tools/bin/ruff format --no-cache -q $(CODE)

# Three at a time, by the parts that tests/conftest.py has: one of them waits for something.
test: check
	$(IN_TOOLS) $(AS_ROOT) $(PYTEST) -n 3 --dist loadscope --no-loadscope-reorder --durations=20 \
		tests/guest tests/host tests/system

# -s, since it tells how far it is.
test-faults: export MICROVM_HOST_TEST_ROUNDS = full
test-faults:
	$(IN_TOOLS) $(AS_ROOT) $(PYTEST) -s -v -m fault tests/system

# BENCH="start-16-taps list-1000" measures these alone, BENCH=--keep writes docs/benchmarks.*,
# BENCH=--help tells the rest.
bench:
	tests/prerequisites
	$(IN_TOOLS) $(AS_ROOT) $$tools/bin/python -B -m tests.bench $(BENCH)

demo:
	tests/prerequisites
	$(AS_ROOT) $(TEST_PYTHON) -B -m tests.demo

demo-shell:
	tests/prerequisites
	$(AS_ROOT) $(TEST_PYTHON) -B -m tests.demo --shell

# dpkg-buildpackage writes beside the source, so that it gets a copy of it.
deb:
	rm -rf build/deb
	mkdir -p build/deb/source
	git ls-files -z | tar --create --null --files-from=- | tar --extract -C build/deb/source
	cd build/deb/source && dpkg-buildpackage -b -us -uc
	rm -rf build/deb/source

clean:
	$(AS_ROOT) $(TEST_PYTHON) -B -m tests.host clean
	rm -rf $${XDG_CACHE_HOME:-$$HOME/.cache}/microvm-host
