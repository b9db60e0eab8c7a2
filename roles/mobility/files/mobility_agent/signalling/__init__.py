# SPDX-License-Identifier: GPL-3.0-or-later
"""Mobility messages between agents: the socket, heartbeats, who answers and how fast."""
