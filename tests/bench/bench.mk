# SPDX-License-Identifier: GPL-3.0-or-later
.PHONY: bench

TABLE ?= precache

bench: venv ## measure: make bench TABLE=precache|evacuation|peacetime (writes build/bench/TABLE.json)
	@PYTHONPATH="$(ROOT)/tests/bench:$(ROOT)/tests/lab:$(ROOT)/roles/precache_proxy/files" \
		$(PYTHON) -m lifeboat_bench $(TABLE) --output "$(BUILD)/bench"
