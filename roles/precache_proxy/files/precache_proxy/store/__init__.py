# SPDX-License-Identifier: GPL-3.0-or-later
"""Replicas: everything at the destination that must survive a power cut."""
