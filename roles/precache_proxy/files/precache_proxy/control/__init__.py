# SPDX-License-Identifier: GPL-3.0-or-later
"""The control interface: HTTP on a UNIX socket, metrics, and what the command line prints."""
