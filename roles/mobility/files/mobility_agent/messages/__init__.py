# SPDX-License-Identifier: GPL-3.0-or-later
"""The signalling on the wire: mobility headers (RFC 6275) and their options."""
