# SPDX-License-Identifier: GPL-3.0-or-later
"""What the kernel forwards by: routes, rules, neighbours, tunnels, filters."""
