# SPDX-License-Identifier: GPL-3.0-or-later
"""Guests whose every acknowledged write can be checked."""
