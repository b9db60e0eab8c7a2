# SPDX-License-Identifier: GPL-3.0-or-later
"""Disk images as ranges of blocks: extents, NBD, exports and image files."""
