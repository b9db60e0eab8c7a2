# SPDX-License-Identifier: GPL-3.0-or-later
"""The mutual-TLS bundle of TCP connections between two proxies."""
