# SPDX-License-Identifier: GPL-3.0-or-later
"""What holds for all unit tests."""

from hypothesis import settings

# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("lifeboat", deadline=None)
settings.load_profile("lifeboat")
