# SPDX-License-Identifier: GPL-3.0-or-later
"""The gateway's duty: the VMs here, their registration with every anchor, their first hop."""
