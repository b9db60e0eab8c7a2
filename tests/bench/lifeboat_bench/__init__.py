# SPDX-License-Identifier: GPL-3.0-or-later
"""The benchmark tables: Lifeboat and the stock tool measured in one run, with the bound beside them."""
