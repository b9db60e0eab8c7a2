# SPDX-License-Identifier: GPL-3.0-or-later
"""What we ask of libvirt, and what a domain's definition says."""
