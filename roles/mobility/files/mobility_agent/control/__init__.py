# SPDX-License-Identifier: GPL-3.0-or-later
"""What people and programs on this host talk to."""
