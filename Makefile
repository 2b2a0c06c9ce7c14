# Each target makes the environment that it needs in .venv, and makes it anew when pyproject.toml has changed.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
PREFIX ?= /opt/mlpiped
BINDIR ?= /usr/local/bin
CONFDIR ?= /etc/mlpiped
UNITDIR ?= /etc/systemd/system
USERUNITDIR ?= /etc/systemd/user
SYSUSERSDIR ?= /etc/sysusers.d
TMPFILESDIR ?= /etc/tmpfiles.d
# What `make install-service` writes lies below it: for packages, images and containers.
DESTDIR ?=
PYTEST_ARGS ?=
SOAK_SECONDS ?= 600

# The first Python that is new enough and can make a virtual environment.
find_python = for p in $${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null 2>&1 \
	&& $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& { command -v $$p; exit 0; }; done; \
	echo 'error: no Python 3.11 or newer with its venv module on PATH' >&2; \
	echo 'hint: install it (Debian: apt install python3-venv), or name one: make PYTHON=/path/to/python3' >&2; exit 1

.PHONY: help venv check test bench demo install install-program install-service uninstall uninstall-service clean

help:
	@echo 'make demo     the main job, end to end, on real data'
	@echo 'make test     every test'
	@echo 'make check    format, lint, types, layers'
	@echo 'make soak     daemons that die, for SOAK_SECONDS (600)'
	@echo 'make bench    the benchmarks'
	@echo 'make venv     the environment for development, in $(VENV)'
	@echo 'make install  as root: $(PREFIX), commands in $(BINDIR), and the service; upgrades it too'
	@echo 'make install-service, uninstall-service, uninstall   its parts, and the way back: config and state stay'
	@echo 'make clean    remove what was made here'

venv: $(VENV)/.dev

$(VENV)/.python:
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		python=$$($(find_python)); \
		echo "venv: $(VENV) with $$python"; \
		rm -rf $(VENV); $$python -m venv $(VENV); \
	fi; touch $@

# An extra for each purpose, so that a demo does not wait for the linters.
$(VENV)/.dev $(VENV)/.demo: $(VENV)/.%: $(VENV)/.python pyproject.toml
	@echo 'pip: installing .[$*]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

check: $(VENV)/.dev
	@echo 'check: format'; $(BIN)/ruff format --check --quiet . \
		|| { echo 'hint: $(BIN)/ruff format .' >&2; exit 1; }
	@echo 'check: lint'; $(BIN)/ruff check --quiet .
	@echo 'check: types'; $(BIN)/mypy
	@echo 'check: layers'; $(BIN)/python -m pytest -q tests/test_layers.py

# The unit tests share the cores, one more at a time than there are cores, since many wait; the others measure, kill and
# boot, and want the machine to themselves.
test: $(VENV)/.dev
	@echo 'test: unit'; $(BIN)/python -m pytest -q -n $$(( $$(nproc) + 1 )) --dist worksteal tests/unit tests/test_layers.py $(PYTEST_ARGS)
	@echo 'test: the rest'; $(BIN)/python -m pytest --durations=30 --ignore=tests/unit --ignore=tests/test_layers.py $(PYTEST_ARGS)

soak: $(VENV)/.dev
	@PYTHONPATH=tests:tests/faults $(BIN)/python -m crash.soak --seconds $(SOAK_SECONDS)

bench: $(VENV)/.dev
	@$(BIN)/python -m tests.bench.run

demo: $(VENV)/.demo
	@$(BIN)/mlpiped demo

install: install-program install-service

# A service that runs goes on with what it has loaded, until `systemctl restart mlpiped`; its steps live through that.
install-program:
	@python=$$($(find_python)); \
	echo "install: $(PREFIX) with $$python"; $$python -m venv $(PREFIX)
	@$(PREFIX)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade .
	@install -d $(BINDIR)
	@ln -sfn $(PREFIX)/bin/mlpiped $(BINDIR)/mlpiped; ln -sfn $(PREFIX)/bin/mlpipectl $(BINDIR)/mlpipectl

with_bindir = sed 's|/usr/local/bin/mlpiped|$(BINDIR)/mlpiped|'
systemd_runs = test -z '$(DESTDIR)' -a -d /run/systemd/system

install-service:
	@install -d $(addprefix $(DESTDIR),$(CONFDIR)/plugins $(UNITDIR) $(USERUNITDIR) $(SYSUSERSDIR) $(TMPFILESDIR))
	@$(with_bindir) systemd/mlpiped.service > $(DESTDIR)$(UNITDIR)/mlpiped.service
	@$(with_bindir) systemd/user/mlpiped.service > $(DESTDIR)$(USERUNITDIR)/mlpiped.service
	@install -m 0644 systemd/mlpiped.sysusers $(DESTDIR)$(SYSUSERSDIR)/mlpiped.conf
	@install -m 0644 systemd/mlpiped.tmpfiles $(DESTDIR)$(TMPFILESDIR)/mlpiped.conf
	@test -e $(DESTDIR)$(CONFDIR)/mlpiped.toml \
		|| install -m 0644 config/mlpiped.toml $(DESTDIR)$(CONFDIR)/mlpiped.toml
	@if $(systemd_runs); then \
		systemd-sysusers $(SYSUSERSDIR)/mlpiped.conf; systemd-tmpfiles --create $(TMPFILESDIR)/mlpiped.conf; \
		systemctl daemon-reload; \
	else echo 'next: systemd-sysusers && systemd-tmpfiles --create && systemctl daemon-reload'; fi
	@echo 'next: systemctl enable --now mlpiped; after an upgrade: systemctl restart mlpiped'

uninstall: uninstall-service
	@rm -rf $(PREFIX); rm -f $(BINDIR)/mlpiped $(BINDIR)/mlpipectl
	@echo 'uninstall: $(PREFIX) is gone'

# Never the user, the config, the plugins, the ledger or the artifacts: installed again, it goes on where it was.
uninstall-service:
	@if $(systemd_runs); then systemctl disable --now mlpiped 2>/dev/null || true; fi
	@rm -f $(DESTDIR)$(UNITDIR)/mlpiped.service $(DESTDIR)$(USERUNITDIR)/mlpiped.service
	@rm -f $(DESTDIR)$(SYSUSERSDIR)/mlpiped.conf $(DESTDIR)$(TMPFILESDIR)/mlpiped.conf
	@if $(systemd_runs); then systemctl daemon-reload; fi
	@echo 'uninstall: the service is gone; $(CONFDIR), /var/lib/mlpiped and the user mlpiped stay; so do steps that run'

clean:
	@rm -rf $(VENV) build dist *.egg-info demo-output bench-output .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find mlpiped plugins tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
	@echo 'clean: done'
