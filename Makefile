# SPDX-License-Identifier: MIT
# make demo        boots a throw-away host and runs a microVM in it, start to end
# make demo-shell  the same, leaving you at a shell of that host
# make test        all tests, in throw-away hosts; installs what they need
# make test-faults those tests that break things on purpose, with all their rounds: an hour
# make fuzz        a million broken inputs for whatever root reads: ten minutes, as make check
# make bench       measures the toolkit beside shell scripts and supervisord: a quarter of an hour
# make check       format, types, unit, golden and static tests: a minute, and no root once
#                  what it needs is installed
# make install     into this machine (DESTDIR, PREFIX and the directories below are honoured)
# make uninstall   takes that back; VMs, their state and their declarations stay
# make clean       what tests and demo keep for the next time: roots of hosts, the Python tools

PREFIX ?= /usr/local
DESTDIR ?=
PYTHON ?= /usr/bin/python3

bindir ?= $(PREFIX)/bin
libdir ?= $(PREFIX)/lib
datarootdir ?= $(PREFIX)/share
mandir ?= $(datarootdir)/man
bashcompletiondir ?= $(datarootdir)/bash-completion/completions
pkgdir ?= $(libdir)/microvm-host
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
	-e 's|@libexecdir@|$(pkgdir)|g' -e 's|@unitdir@|$(unitdir)|g' -e 's|@statedir@|$(statedir)|g' \
	-e 's|@datadir@|$(datadir)|g'

UNITS = $(patsubst units/%.in,%,$(wildcard units/*.in))
PLAIN_UNITS = $(notdir $(wildcard units/*.target))
RULES = $(notdir $(wildcard udev/*.rules))
PACKAGES = $(sort $(dir $(wildcard microvm_host/*.py microvm_host/*/*.py)))
MANPAGES = $(notdir $(wildcard man/*.[1-8]))

.PHONY: all install uninstall check fuzz test test-faults bench demo demo-shell format clean
all:
	@sed -n 's/^# make/make/p' Makefile

install:
	$(INSTALL) -d $(addprefix $(DESTDIR),$(bindir) $(unitdir) $(generatordir) $(presetdir) \
		$(sysusersdir) $(tmpfilesdir) $(modulesloaddir) $(udevrulesdir) $(bashcompletiondir) \
		$(datadir)/network $(addprefix $(pkgdir)/,$(PACKAGES)) \
		$(addprefix $(mandir)/man,$(sort $(subst .,,$(suffix $(MANPAGES))))))
	for package in $(PACKAGES); do \
		$(INSTALL) -m 644 $$package*.py $(DESTDIR)$(pkgdir)/$$package || exit 1; done
	for unit in $(UNITS); do $(FILL) units/$$unit.in > $(DESTDIR)$(unitdir)/$$unit || exit 1; \
		chmod 644 $(DESTDIR)$(unitdir)/$$unit; done
	for unit in $(PLAIN_UNITS); do \
		$(INSTALL) -m 644 units/$$unit $(DESTDIR)$(unitdir) || exit 1; done
	$(FILL) bin/helper.in > $(DESTDIR)$(pkgdir)/helper
	$(FILL) bin/microvm.in > $(DESTDIR)$(bindir)/microvm
	$(FILL) bin/microvm-generator.in > $(DESTDIR)$(generatordir)/microvm-generator
	chmod 755 $(DESTDIR)$(pkgdir)/helper $(DESTDIR)$(bindir)/microvm \
		$(DESTDIR)$(generatordir)/microvm-generator
	$(INSTALL) -m 644 data/sysusers.conf $(DESTDIR)$(sysusersdir)/microvm-host.conf
	$(FILL) data/tmpfiles.conf.in > $(DESTDIR)$(tmpfilesdir)/microvm-host.conf
	$(FILL) data/ssh_config.in > $(DESTDIR)$(datadir)/ssh_config
	chmod 644 $(DESTDIR)$(tmpfilesdir)/microvm-host.conf $(DESTDIR)$(datadir)/ssh_config
	$(INSTALL) -m 644 data/modules-load.conf $(DESTDIR)$(modulesloaddir)/microvm-host.conf
	$(INSTALL) -m 644 data/preset $(DESTDIR)$(presetdir)/90-microvm-host.preset
	$(INSTALL) -m 644 data/microvm.schema.json $(DESTDIR)$(datadir)/microvm.schema.json
	$(INSTALL) -m 644 $(wildcard data/network/*) $(DESTDIR)$(datadir)/network
	# By this, the command finds them as in a checkout.
	ln -srfn $(DESTDIR)$(datadir) $(DESTDIR)$(pkgdir)/data
	for rules in $(RULES); do \
		$(INSTALL) -m 644 udev/$$rules $(DESTDIR)$(udevrulesdir) || exit 1; done
	for page in $(MANPAGES); do \
		$(INSTALL) -m 644 man/$$page $(DESTDIR)$(mandir)/man$${page##*.} || exit 1; done
	$(INSTALL) -m 644 completion/microvm.bash $(DESTDIR)$(bashcompletiondir)/microvm
	# Compiled once here instead of at every start: the helpers run isolated, and some of them
	# as users who could not write the result. The path is the one that it will run from.
	$(PYTHON) -m compileall -q -f -s "$(DESTDIR)" -p / $(DESTDIR)$(pkgdir)/microvm_host
ifeq ($(DESTDIR),)
	systemd-sysusers $(sysusersdir)/microvm-host.conf
	systemd-tmpfiles --create $(tmpfilesdir)/microvm-host.conf
	if [ -d /run/systemd/system ]; then \
		systemctl daemon-reload; \
		systemctl preset microvms.target; \
		for module in $$(sed -n '/^[a-z]/p' data/modules-load.conf); do \
			modprobe -q $$module || true; done; \
	fi
	# Nodes that are there already get their group now. Containers have no udev.
	if [ -d /run/systemd/system ] && systemctl -q is-active systemd-udevd.service; then \
		udevadm control --reload && udevadm trigger --settle --action=change \
			--subsystem-match=misc --sysname-match='vhost-*' --sysname-match=iommu; \
	fi
endif

# VMs, their state and their declarations stay, and so does the user who owns files of theirs.
uninstall:
ifeq ($(DESTDIR),)
	@if [ -d /run/systemd/system ] && \
		systemctl -q is-active 'microvm@*.service' 'microvm-foreground-*.service'; then \
		echo "microVMs are running: stop them first, with systemctl stop 'microvm@*'" >&2; \
		exit 1; fi
	if [ -d /run/systemd/system ]; then systemctl disable microvms.target; fi
endif
	rm -rf $(DESTDIR)$(pkgdir) $(DESTDIR)$(datadir)
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

# Two at a time, by the kinds that tests/conftest.py has.
test: check
	$(IN_TOOLS) $(AS_ROOT) $(PYTEST) -n 2 --dist loadscope --durations=20 \
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

clean:
	$(AS_ROOT) $(TEST_PYTHON) -B -m tests.host clean
	rm -rf $${XDG_CACHE_HOME:-$$HOME/.cache}/microvm-host
