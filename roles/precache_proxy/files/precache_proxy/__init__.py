# SPDX-License-Identifier: GPL-3.0-or-later
"""The precache proxy of Lifeboat: copies changed disk blocks to a peer and hands running VMs over."""

__version__ = "0.1.0"
