# SPDX-License-Identifier: GPL-3.0-or-later
.PHONY: bench

TABLE ?= precache

bench: venv build ## measure: make bench TABLE=precache|evacuation|peacetime|handover|coordination|deadline (writes build/bench/TABLE.json; also scale)
	@mkdir -p "$(BUILD)/checkout/ansible_collections/lifeboat"
	@ln -sfn "$(ROOT)" "$(BUILD)/checkout/ansible_collections/lifeboat/evacuation"
	@PYTHONPATH="$(ROOT)/tests/bench:$(ROOT)/tests/lab:$(ROOT)/roles/precache_proxy/files:$(BUILD)/checkout" \
		$(PYTHON) -m lifeboat_bench $(TABLE) --output "$(BUILD)/bench"
