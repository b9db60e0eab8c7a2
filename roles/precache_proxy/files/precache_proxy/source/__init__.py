# SPDX-License-Identifier: GPL-3.0-or-later
"""The source side: what changed on a VM's disks, and its way to the peer."""
