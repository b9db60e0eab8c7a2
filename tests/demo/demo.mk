# SPDX-License-Identifier: GPL-3.0-or-later
.PHONY: demo

demo: venv build ## build the lab, evacuate three VMs, check that nothing was lost (root; under 10 minutes)
	@tests/lab/install-dependencies
	@PYTHONPATH="$(ROOT)/tests/demo:$(ROOT)/tests/bench:$(ROOT)/tests/lab" \
		$(PYTHON) -m lifeboat_demo --output "$(BUILD)/demo"
