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
# (LIFEBOAT_INSTALLED: elsewhere, for who works on something else in the same checkout meanwhile.)
LIFEBOAT_INSTALLED ?= $(BUILD)/installed
export LIFEBOAT_INSTALLED
INSTALLED := $(LIFEBOAT_INSTALLED)
PYTEST_ARGS ?=

export PATH := $(BIN):$(PATH)
export ANSIBLE_COLLECTIONS_PATH := $(INSTALLED)
export ANSIBLE_HOME := $(BUILD)/ansible-home
# What is run as root on hosts must not leave byte code in the checkout, nor in what is packed from it.
export PYTHONDONTWRITEBYTECODE := 1

.PHONY: help install-dependencies venv build lint lint-python lint-yaml lint-ansible sanity introspect \
	test-quick routing-daemons test soak clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "  %-22s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install-dependencies: ## install the Debian packages that tests and tools need and that are missing (root)
	@tests/frame/install-dependencies

venv: install-dependencies $(VENV)/.complete ## make or refresh .venv from requirements-dev.txt

$(VENV)/.complete: requirements-dev.txt
	@tests/frame/make-venv "$(SYSTEM_PYTHON)" "$(VENV)" requirements-dev.txt

build: venv ## build the collection and install it under build/installed, as a user would
	@tests/frame/build-collection "$(ARCHIVE)" "$(INSTALLED)"
	@mkdir -p "$(BUILD)/checkout/ansible_collections/lifeboat"
	@ln -sfn "$(ROOT)" "$(BUILD)/checkout/ansible_collections/lifeboat/evacuation"

lint: venv build ## every check of the code that runs nothing of it; all findings, not the first check's only
	@$(MAKE) --no-print-directory --keep-going lint-python lint-yaml lint-ansible introspect sanity

lint-python: ## ruff (rules and format) and mypy --strict
	ruff check .
	ruff format --check .
	tests/frame/run-mypy

lint-yaml: ## yamllint
	yamllint --strict .

lint-ansible: build ## ansible-lint, profile production, and the changelog's fragments
	ansible-lint --offline --strict
	antsibull-changelog lint

introspect: build ## what an execution environment would install, read from the installed collection
	@ansible-builder introspect --sanitize "$(INSTALLED)" >"$(BUILD)/introspect.txt" || { cat "$(BUILD)/introspect.txt"; exit 1; }
	@grep -q 'lifeboat.evacuation' "$(BUILD)/introspect.txt" || { cat "$(BUILD)/introspect.txt"; exit 1; }
	@echo "introspect: requirements of the collection found"

sanity: build ## ansible-test sanity on the installed collection
	@tests/frame/run-sanity "$(INSTALLED)" "$(BUILD)" >"$(BUILD)/sanity.log" 2>&1 || \
	  { grep -E '^(ERROR|FATAL|WARNING)' "$(BUILD)/sanity.log" || tail -40 "$(BUILD)/sanity.log"; exit 1; }
	@echo "sanity: $$(grep -c '^Running sanity test' "$(BUILD)/sanity.log") tests passed"

test-quick: venv build lint-python lint-yaml ## under 5 minutes: linters and unit tests, no lab
	$(PYTEST) tests/unit -m "not lab and not soak" --numprocesses 4 --dist worksteal $(PYTEST_ARGS)

routing-daemons: venv ## FRR and radvd for tests in namespaces: unpacked under build, nothing is installed
	@tests/frame/unpack-routing-daemons "$(BUILD)/routing-daemons"

test: venv build routing-daemons ## everything but soak; builds the lab and takes it down again
	@tests/frame/run-tests "not soak"

soak: venv build routing-daemons ## what takes too long for every run: full crash tables, many rounds there and back
	@tests/frame/run-tests "soak"

clean: ## remove what was built (not .venv, not the lab)
	rm -rf "$(BUILD)"

-include tests/lab/lab.mk tests/bench/bench.mk tests/demo/demo.mk
