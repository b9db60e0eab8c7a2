# SPDX-License-Identifier: GPL-3.0-or-later
"""A model of sites, links, guests and failures, driven by the collection's own planner and controller."""
