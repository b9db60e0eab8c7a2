# SPDX-License-Identifier: GPL-3.0-or-later
"""The demonstration: three virtual machines leave a site over a slow WAN, and nothing is lost."""
