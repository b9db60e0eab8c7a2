# SPDX-License-Identifier: GPL-3.0-or-later
"""What the lab raises at its user."""


class LabError(Exception):
    """One sentence that names the thing, the fact and the way out; the command line prints it and ends with
    1."""
