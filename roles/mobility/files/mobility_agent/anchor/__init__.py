# SPDX-License-Identifier: GPL-3.0-or-later
"""The anchor's duty: bindings, kept over a restart, and the home prefixes."""
