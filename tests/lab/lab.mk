# SPDX-License-Identifier: GPL-3.0-or-later
# Targets of the lab; included by the Makefile.

LAB := tests/lab/lab

.PHONY: lab-up lab-down lab-status

lab-up: ## build the two-site lab and switch it on (root; LIFEBOAT_LAB, _HOSTS, _SUITE)
	@$(LAB) up

lab-down: ## remove the lab and everything it made, except cached images
	@$(LAB) down

lab-status: ## what the lab has and whether it runs
	@$(LAB) status
