# SPDX-License-Identifier: GPL-3.0-or-later
"""The two-site lab: real systemd hosts with real libvirt, and a WAN between them, on one machine."""
