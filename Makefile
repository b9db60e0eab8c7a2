# SPDX-License-Identifier: GPL-3.0-or-later
# Entry points for people and for continuous integration. "make help" lists them.
# The lab, the benchmarks and the demonstration bring their targets in fragments beside their code.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

ROOT := $(CURDIR)
BUILD := $(ROOT)/build
VENV := $(ROOT)/.venv
# Debian's own interpreter, not whichever comes first on PATH: only that one sees python3-libvirt and -libnbd.
SYSTEM_PYTHON ?= /usr/bin/python3
BIN := $(VENV)/bin
PYTHON := $(BIN)/python
PYTEST := $(BIN)/pytest
VERSION := $(shell sed -n 's/^version: *//p' galaxy.yml)
ARCHIVE := $(BUILD)/lifeboat-evacuation-$(VERSION).tar.gz
# The collection as a user has it: built, then installed. Tests run playbooks from here, not from the checkout.
INSTALLED := $(BUILD)/installed
PYTEST_ARGS ?=

export PATH := $(BIN):$(PATH)
export ANSIBLE_COLLECTIONS_PATH := $(INSTALLED)
export ANSIBLE_HOME := $(BUILD)/ansible-home
# What is run as root on hosts must not leave byte code in the checkout, nor in what is packed from it.
export PYTHONDONTWRITEBYTECODE := 1

.PHONY: help install-dependencies venv build lint lint-python lint-yaml lint-ansible sanity introspect \
	test-quick test soak clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "  %-22s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install-dependencies: ## install the Debian packages that tests and tools need and that are missing (root)
	@tests/frame/install-dependencies

venv: install-dependencies $(VENV)/.complete ## make or refresh .venv from requirements-dev.txt

$(VENV)/.complete: requirements-dev.txt
	@tests/frame/make-venv "$(SYSTEM_PYTHON)" "$(VENV)" requirements-dev.txt

-include tests/lab/lab.mk tests/bench/bench.mk tests/demo/demo.mk
